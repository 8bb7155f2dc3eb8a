"""Every family that takes media, by the conformance kit."""

from pathlib import Path

from modelport.testing import conformance_tests

GOLDENS = Path(__file__).parents[2] / "goldens"

test_blip2 = conformance_tests("Blip2ForConditionalGeneration")
test_chameleon = conformance_tests("ChameleonForConditionalGeneration")
test_fuyu = conformance_tests("FuyuForCausalLM")
test_gemma3 = conformance_tests("Gemma3ForConditionalGeneration")
test_llava = conformance_tests("LlavaForConditionalGeneration")
test_llava_next = conformance_tests("LlavaNextForConditionalGeneration")
test_llava_next_video = conformance_tests("LlavaNextVideoForConditionalGeneration")
test_llava_onevision = conformance_tests("LlavaOnevisionForConditionalGeneration")
test_mllama = conformance_tests("MllamaForConditionalGeneration")
test_paligemma = conformance_tests("PaliGemmaForConditionalGeneration")
test_pixtral_merge_recorded = conformance_tests(golden=GOLDENS / "pixtral-native-merge")
test_pixtral_recorded = conformance_tests(golden=GOLDENS / "pixtral-native")
test_qwen2_5_vl = conformance_tests("Qwen2_5_VLForConditionalGeneration")
test_qwen2_vl = conformance_tests("Qwen2VLForConditionalGeneration")
test_qwen3_vl = conformance_tests("Qwen3VLForConditionalGeneration")
