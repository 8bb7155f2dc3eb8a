"""Every built-in text family, by the conformance kit: against its reference, and against recorded outputs."""

from pathlib import Path

from modelport.testing import conformance_tests

GOLDENS = Path(__file__).parents[2] / "goldens"

test_aquila = conformance_tests("AquilaForCausalLM")
test_bart = conformance_tests("BartForConditionalGeneration")
test_deepseek_v2 = conformance_tests("DeepseekV2ForCausalLM")
test_deepseek_v3 = conformance_tests("DeepseekV3ForCausalLM")
test_falcon_mamba = conformance_tests("FalconMambaForCausalLM")
test_gemma = conformance_tests("GemmaForCausalLM")
test_gemma2 = conformance_tests("Gemma2ForCausalLM")
test_gpt2 = conformance_tests("GPT2LMHeadModel")
test_gpt_bigcode = conformance_tests("GPTBigCodeForCausalLM")
test_granite = conformance_tests("GraniteForCausalLM")
test_internlm = conformance_tests("InternLMForCausalLM")
test_internlm_recorded = conformance_tests(golden=GOLDENS / "internlm-7b")
test_jamba = conformance_tests("JambaForCausalLM")
test_llama = conformance_tests("LlamaForCausalLM")
test_mamba = conformance_tests("MambaForCausalLM")
test_mamba2 = conformance_tests("Mamba2ForCausalLM")
test_minicpm3 = conformance_tests("MiniCPM3ForCausalLM")
test_mistral = conformance_tests("MistralForCausalLM")
test_mixtral = conformance_tests("MixtralForCausalLM")
test_nemotron = conformance_tests("NemotronForCausalLM")
test_olmo = conformance_tests("OLMoForCausalLM")
test_olmo2 = conformance_tests("Olmo2ForCausalLM")
test_phi = conformance_tests("PhiForCausalLM")
test_qwen2 = conformance_tests("Qwen2ForCausalLM")
test_qwen2_moe = conformance_tests("Qwen2MoeForCausalLM")
test_qwen3 = conformance_tests("Qwen3ForCausalLM")
test_starcoder2 = conformance_tests("Starcoder2ForCausalLM")
test_xverse = conformance_tests("XverseForCausalLM")
test_xverse_recorded = conformance_tests(golden=GOLDENS / "xverse-7b")
