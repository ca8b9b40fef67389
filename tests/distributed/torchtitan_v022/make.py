"""Makes what lies beside it anew: runs of torchtitan v0.2.2, cut down until a checkpoint is small.

    python make.py PYTHON      # PYTHON: an environment with torch, torchtitan 0.2.2, safetensors and triton

`data/` has what both trainers find under `tests/assets` of the folder in which they start: `c4_test` and `tokenizer`.
`one_rank.tar.gz`: checkpoint folder of 6 steps on one rank, step 3 whole, step 6 the weights alone in bfloat16.
`two_ranks.tar.gz`: step 2 of a run on two ranks (FSDP 2). `losses.json`: loss and gradient norm by step of a run of 6
steps on one rank, as torchtitan has them in memory.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
WORDS = ("rain", "river", "stone", "light", "under", "over", "falls", "rises", "turns", "small", "old", "quiet", "the")
BASE = 268  # tokens of the vocabulary without the two that begin and end a text
SIZES = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 272, "multiple_of": 8}
FILE = """[job]
dump_folder = "./out"
[model]
name = "llama3"
flavor = "debugmodel"
hf_assets_path = "./tests/assets/tokenizer"
[optimizer]
lr = 8e-3
[lr_scheduler]
warmup_steps = 2
[training]
local_batch_size = 2
seq_len = 24
steps = 6
dataset = "c4_test"
mixed_precision_param = "float32"
[activation_checkpoint]
mode = "none"
[metrics]
log_freq = 1
[debug]
seed = 42
[checkpoint]
enable = true
interval = 3
export_dtype = "bfloat16"
"""


def main(python: str) -> None:
    make_data(python, HERE / "data")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for ranks, steps, interval in ((1, 6, 3), (2, 3, 2)):
            folder = work / f"ranks_{ranks}"
            (folder / "tests").mkdir(parents=True)
            (folder / "tests/assets").symlink_to(HERE / "data")
            (folder / "run.toml").write_text(FILE)
            given = ["--job.config_file=run.toml", f"--training.steps={steps}", f"--checkpoint.interval={interval}"]
            start(python, folder, ranks, given)
        pack(work / "ranks_1/out/checkpoint", ["step-3", "step-6"], HERE / "one_rank.tar.gz")
        pack(work / "ranks_2/out/checkpoint", ["step-2"], HERE / "two_ranks.tar.gz")
        (HERE / "losses.json").write_text((work / "ranks_1/losses.json").read_text())
    (HERE / "run.toml").write_text(FILE)


def make_data(python: str, folder: Path) -> None:
    texts, tokenizer = folder / "c4_test", folder / "tokenizer"
    texts.mkdir(parents=True, exist_ok=True)
    tokenizer.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    documents = [" ".join(draw.choices(WORDS, k=draw.randint(3, 30))) for _ in range(40)]
    (texts / "data.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    subprocess.run([python, str(Path(__file__)), "--tokenizer", str(tokenizer), *documents], check=True)


def make_tokenizer(folder: Path, documents: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=BASE, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(["<|begin|>", "<|end|>"])
    made.save(str(folder / "tokenizer.json"))
    kinds = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(BASE + n): {"content": text, **kinds} for n, text in enumerate(("<|begin|>", "<|end|>"))}
    config = {"added_tokens_decoder": added, "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))


def start(python: str, folder: Path, ranks: int, arguments: list[str]) -> None:
    """One run of torchtitan, on forked ranks of this machine."""
    ours = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(random.randint(20_000, 29_000)), "WORLD_SIZE": str(ranks)}
    running = [
        subprocess.Popen(
            [python, str(Path(__file__)), "--train", *arguments],
            cwd=folder,
            env={**os.environ, **ours, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    assert [one.wait() for one in running] == [0] * ranks


def pack(folder: Path, names: list[str], out: Path) -> None:
    with tarfile.open(out, "w:gz") as archive:
        for name in names:
            archive.add(folder / name, name)


def train(arguments: list[str]) -> None:
    """In torchtitan's environment. It takes what PyTorch calls the accelerator; here the CPU answers for one."""
    import torch
    import torch._utils

    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda kind: torch.cpu
    for name, answer in {
        "get_device_name": "cpu",
        "get_device_properties": SimpleNamespace(total_memory=1 << 34, name="cpu"),
        "memory_stats": {},
        "reset_peak_memory_stats": None,
        "empty_cache": None,
    }.items():
        setattr(torch.cpu, name, lambda *_, answer=answer: answer)
    sys.argv = ["torchtitan.train", *arguments]
    import torchtitan.distributed.utils
    import torchtitan.models.llama3
    from torch.distributed.fsdp import FSDPModule

    import torchtitan.train

    torchtitan.distributed.utils.set_pg_timeouts = lambda *_, **__: None  # a barrier that names a device
    divide = FSDPModule.set_gradient_divide_factor

    def divide_first(module: FSDPModule, factor: float) -> None:  # gloo cannot multiply while it sums
        divide(module, factor)
        module.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = divide_first
    torchtitan.models.llama3.llama3_args["debugmodel"] = torchtitan.models.llama3.TransformerModelArgs(**SIZES)
    seen = []

    class Recorded(torchtitan.train.Trainer):
        def __init__(self, job_config: object) -> None:
            super().__init__(job_config)
            log = self.metrics_processor.log

            def record(step: int, loss: float, most: float, norm: float, extra_metrics: dict[str, float]) -> None:
                seen.append({"step": step, "loss": loss, "grad_norm": norm, "lr": extra_metrics["lr"]})
                log(step, loss, most, norm, extra_metrics)

            self.metrics_processor.log = record

    torchtitan.train.main(Recorded)
    Path("losses.json").write_text(json.dumps(seen, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--train":
        train(sys.argv[2:])
    elif sys.argv[1] == "--tokenizer":
        make_tokenizer(Path(sys.argv[2]), sys.argv[3:])
    else:
        main(sys.argv[1])
