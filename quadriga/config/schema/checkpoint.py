"""[checkpoint]: what is saved and when, and what a run starts from."""

from __future__ import annotations

from typing import Literal

from quadriga.config.schema.section import Amount, Count, Name, NewestOrStep, Positive, Seconds, Section

State = Literal["model", "optimizer", "lr_scheduler", "dataloader", "train_state", "random"]


class Checkpoint(Section):
    """Saving and resuming. A run resumes from the newest good checkpoint in its folder."""

    enable: bool = False
    """Save checkpoints, and resume from them."""

    enable_ft_dataloader_checkpoints: bool = True
    """With `fault_tolerance`: save the data position of each replica group."""

    folder: Name = "checkpoint"
    """Folder of the checkpoints (`step-N`) inside the run folder, or a URL (`s3://bucket/run`)."""

    interval: Count = 500
    """Steps between two saves. The last step is always saved."""

    interval_minutes: Positive | None = None
    """Also save if this many minutes have passed since the last save."""

    initial_load_path: str | None = None
    """A checkpoint folder or URL to start from if the run has no checkpoint of its own yet."""

    initial_load_model_only: bool = True
    """Load only the weights from `initial_load_path`: no optimizer, no schedule, no data position."""

    initial_load_in_hf: bool = False
    """`initial_load_path`, or else `model.hf_assets_path`, contains Hugging Face safetensors."""

    initial_load_in_hf_quantized: bool = False
    """`initial_load_path` contains block-quantized Hugging Face safetensors."""

    last_save_model_only: bool = False
    """Save the last step without optimizer state: a third of the size, but the run cannot be extended."""

    last_save_in_hf: bool = False
    """Also save the last step as Hugging Face safetensors, in `step-N-hf` next to `step-N`."""

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Format of the weights in a last save without optimizer state, and in one as Hugging Face safetensors."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write checkpoints while training continues."""

    keep_latest_k: Amount = 10
    """The number of newest checkpoints that are kept, at least 2; 0 keeps all."""

    keep_every: Amount = 0
    """Also keep the checkpoints of all multiples of this step forever; 0 switches this off."""

    on_save_failure: Literal["go_on", "stop"] = "go_on"
    """After a failed save (for example a full disk): continue training, or stop. A failed last save always stops."""

    timeout_seconds: Seconds = 1800
    """How long a save or a load may take before it counts as hung; also the time to save after a stop request."""

    storage_retries: Amount = 5
    """How often a failed request to an object store is retried, with increasing pauses."""

    allow_change: bool = False
    """Resume although model, data, seed or batch differ from the checkpoint's. Tensors must keep their shapes."""

    load_step: NewestOrStep = -1
    """The step to resume from; -1 is the newest good checkpoint."""

    exclude_from_loading: tuple[State, ...] = ()
    """Parts of the state that are not loaded."""

    enable_first_step_checkpoint: bool = False
    """Also save after step 1, to find out early whether saving works."""

    create_seed_checkpoint: bool = False
    """Save the initial weights as `step-0` and stop. Not needed here: initial weights depend only on the seed."""

    load_only: bool = False
    """Load checkpoints, but never save any."""
