"""[checkpoint]: what is saved, when, and what a run starts from."""

from __future__ import annotations

from typing import Literal

from quadriga.config.schema.section import Amount, Count, Name, NewestOrStep, Positive, Seconds, Section

State = Literal["model", "optimizer", "lr_scheduler", "dataloader", "train_state", "random"]


class Checkpoint(Section):
    """Saves and resumes. A run that finds a finished save in its folder goes on from the newest."""

    enable: bool = False
    """Save checkpoints, and resume from them."""

    enable_ft_dataloader_checkpoints: bool = True
    """With `fault_tolerance`: save the position in the data of each replica group."""

    folder: Name = "checkpoint"
    """Folder of the checkpoints inside the run folder, or a URL (`s3://bucket/run`); one `step-N` each."""

    interval: Count = 500
    """Steps between two saves; the last step is always saved."""

    interval_minutes: Positive | None = None
    """Also save when this many minutes have passed since the last save."""

    initial_load_path: str | None = None
    """A checkpoint folder or URL to start from when the run has none of its own yet."""

    initial_load_model_only: bool = True
    """Of `initial_load_path` take the weights alone: no optimizer, no schedule, no position in the data."""

    initial_load_in_hf: bool = False
    """`initial_load_path`, or else `model.hf_assets_path`, holds Hugging Face safetensors."""

    initial_load_in_hf_quantized: bool = False
    """`initial_load_path` holds block-quantized Hugging Face safetensors."""

    last_save_model_only: bool = False
    """Save the last step without optimizer state: a third of the size, and the run cannot be extended."""

    last_save_in_hf: bool = False
    """Save the last step as Hugging Face safetensors too, in `step-N-hf` beside `step-N`."""

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Format of the weights in a last save without optimizer state, and in one as Hugging Face safetensors."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write checkpoints while training goes on."""

    keep_latest_k: Amount = 10
    """Finished saves that are kept; 0 keeps all. At least 2: one being written, one to fall back on."""

    keep_every: Amount = 0
    """Keep the save of every step that this divides for ever, beside the newest; 0 keeps none for ever."""

    on_save_failure: Literal["go_on", "stop"] = "go_on"
    """When a save fails (a full disk): train on and try again at the next one, or stop. The last save always stops."""

    timeout_seconds: Seconds = 1800
    """How long a save or a load may take before it counts as hung; a run told to stop is given as long to save."""

    storage_retries: Amount = 5
    """How often a failed request to an object store is tried again, with growing pauses."""

    allow_change: bool = False
    """Go on though the model, the data, the seed or the batch are not those that the checkpoint was saved with."""

    load_step: NewestOrStep = -1
    """The step to resume from; -1 is the newest finished save."""

    exclude_from_loading: tuple[State, ...] = ()
    """Parts of the state to leave out when loading."""

    enable_first_step_checkpoint: bool = False
    """Save after step 1 too, to learn early whether saving works."""

    create_seed_checkpoint: bool = False
    """Save the initial weights as `step-0` and stop; not needed here, since they depend on the seed alone."""

    load_only: bool = False
    """Load, but never save."""
