"""Copy golden folders into the test data, and keep only what is compared: the logits of the last positions.

    python tests/goldens/trim.py SOURCE/xverse-7b SOURCE/internlm-7b      # into tests/goldens/
    python tests/goldens/trim.py --rows 16 --into FOLDER SOURCE/xverse-7b

The checkpoint is copied as it is: rounding it would change every output. The folders here may hold 40 MB in all.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

ROWS = 8
LIMIT_BYTES = 40 * 2**20
KEPT = ("config.json", "generation_config.json", "params.json", "preprocessor_config.json", "golden.json")


def trim(source: Path, into: Path, rows: int) -> Path:
    """Write `into/<name of source>`; raises FileNotFoundError when `source` is no golden folder."""
    target = into / source.name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "golden.json", target / "golden.json")
    raw_media = [file.name for pattern in ("image_*", "audio_*", "video_*") for file in source.glob(pattern)]
    weights = [file.name for file in source.glob("*.safetensors") if file.name != "golden.safetensors"]
    for name in (*KEPT, *weights, *raw_media):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    tensors = load_file(source / "golden.safetensors")
    kept = {
        name: tensor[-rows:].clone() if re.fullmatch(r"logits_\d+", name) else tensor
        for name, tensor in tensors.items()
        if not name.startswith("greedy_logits_")  # the greedy ids say what they say
    }
    save_file(kept, target / "golden.safetensors")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, default=Path(__file__).parent)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"last positions to keep (default: {ROWS})")
    args = parser.parse_args()
    for source in args.sources:
        target = trim(source, args.into, args.rows)
        size = sum(file.stat().st_size for file in target.iterdir())
        print(f"{target}: {size / 2**20:.2f} MB")
    total = sum(file.stat().st_size for file in args.into.rglob("*") if file.is_file())
    print(f"in all: {total / 2**20:.1f} MB of {LIMIT_BYTES / 2**20:.0f}")
    return 0 if total <= LIMIT_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
