"""Measures the validation loss of a small model on the Shakespeare text on which small models are often compared.

    python benchmarks/shakespeare.py tinyshakespeare.txt

Claim: at most 1.88 nats per byte on the held-out last 10 % of the text, after 2,000 steps of 12 windows of 64 bytes,
with 4 layers, 4 heads and width 128. This is the published CPU result of a GPT of this shape and schedule (nanoGPT's
README: 0.80 M parameters, character tokens, validation loss 1.88).

The script runs the trainer with a file that it writes: tokens are bytes, and a validation at the end covers the whole
held-out part. Each byte is predicted once, from up to 63 bytes before it in its window of 64. The result is the sum of
nats of that validation divided by the number of bytes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import command_line, met_or_missed, save, text_table
from trainer import environment, output_tail, write_toml

from quadriga.metrics.jsonl import read_metrics

TARGET = 1.88
CLAIM = f"at most {TARGET} nats per byte on held-out Shakespeare after 2,000 steps of 768 bytes"
STEPS, WINDOW, ROWS = 2000, 64, 12
SHAPE = {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4}
HELD_OUT = 0.1


def split(text: Path, folder: Path) -> tuple[Path, Path, int]:
    """Write the first nine tenths and the rest to separate files. Returns both paths and the bytes of the rest."""
    content = text.read_bytes()
    at = int((1 - HELD_OUT) * len(content))
    training, validation = folder / "training.txt", folder / "validation.txt"
    training.write_bytes(content[:at])
    validation.write_bytes(content[at:])
    return training, validation, len(content) - at


def configuration(chosen: argparse.Namespace, folder: Path, training: Path, validation: Path) -> dict[str, Any]:
    return {
        "job": {"dump_folder": str(folder / "run"), "description": "bytes of Shakespeare"},
        "model": {
            "flavor": "debugmodel",
            "hf_assets_path": "builtin:bytes",
            "vocab_size": 258,  # bytes, BOS and EOS
            "ffn_dim": chosen.ffn_dim,
            "tie_embeddings": chosen.tie_embeddings,
            **SHAPE,
        },
        "training": {
            "dataset": "text",
            "dataset_path": str(training),
            "local_batch_size": ROWS,
            "seq_len": WINDOW,
            "steps": STEPS,
            "mixed_precision_param": "float32",
        },
        "validation": {
            "enable": True,
            "dataset": "text",
            "dataset_path": str(validation),
            "local_batch_size": 64,
            "seq_len": WINDOW,
            "windows": -1,
            "freq": STEPS,
        },
        "optimizer": {"lr": chosen.lr, "beta2": chosen.beta2, "weight_decay": chosen.weight_decay},
        "lr_scheduler": {
            "warmup_steps": chosen.warmup_steps,
            "decay_type": chosen.decay_type,
            "min_lr_factor": chosen.min_lr_factor,
        },
        "activation_checkpoint": {"mode": "none"},
        "metrics": {"log_freq": 100},
        "debug": {"seed": chosen.seed},
    }


def train(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    training, validation, held_out = split(chosen.text, folder)
    config = write_toml(folder / "run.toml", configuration(chosen, folder, training, validation))
    command = [sys.executable, "-m", "quadriga.train", "--job.config_file", str(config)]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment(1, "cpu"), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"the run failed with exit code {done.returncode}:\n{output_tail(done.stderr)}")
    record = folder / "run" / "metrics.jsonl"
    end = read_metrics(record, kind="validation")[-1]
    if end["step"] != STEPS or end["tokens"] != held_out + 1:
        raise SystemExit(f"validation at step {end['step']} saw {end['tokens']} tokens, not {held_out} bytes and EOS")
    per_byte = end["loss"] * end["tokens"] / held_out
    counted = re.search(r"([\d.,]+ ?\w?) parameters", done.stderr)
    return {
        "settings": {name: value for name, value in vars(chosen).items() if name != "text"},
        "parameters": counted.group(1) if counted else "unknown",
        "held_out_bytes": held_out,
        "nats_per_byte": per_byte,
        "training_loss": read_metrics(record)[-1]["loss"],
        "seconds": round(seconds, 1),
        "target": TARGET,
        "met": per_byte <= TARGET,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("text", type=Path, help="the text; its last tenth is held out")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--decay_type", default="cosine", choices=("linear", "sqrt", "cosine"))
    parser.add_argument("--min_lr_factor", type=float, default=0.0)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--beta2", type=float, default=0.99)
    parser.add_argument("--ffn_dim", type=int, default=336, help="8/3 of the width, in multiples of 16")
    parser.add_argument("--tie_embeddings", action="store_true")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--try_only", action="store_true", help="write no result file")
    chosen = parser.parse_args()
    try_only = vars(chosen).pop("try_only")
    with tempfile.TemporaryDirectory(prefix="quadriga-shakespeare-") as folder:
        figures = train(chosen, Path(folder))
    row = [f"{figures['nats_per_byte']:.4f}", f"{figures['training_loss']:.4f}", f"{figures['seconds']:.0f} s"]
    header = ["parameters", "nats per held-out byte", "last training loss", "time", f"<= {TARGET}"]
    print(text_table(header, [[figures["parameters"], *row, met_or_missed(figures["met"])]]))
    if not try_only:
        print(f"\nwritten: {save('shakespeare', figures, command=command_line(), claim=CLAIM)}")
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
