# %% [markdown]
# Train a small Llama in this process: no GPU, no download, no torchrun. Run the cells in the root of the repository.

# %% Read the configuration; keys given here are set over those of the file
import quadriga

keys = {
    "job.dump_folder": "outputs/notebook",
    "model.n_layers": 2,
    "model.dim": 64,
    "training.seq_len": 64,
    "training.global_batch_size": 4,
    "training.steps": 20,
    "optimizer.lr": 0.01,
    "lr_scheduler.warmup_steps": 5,
    "validation.enable": True,
    "validation.dataset": "builtin",
    "validation.steps": 1,
}
config = quadriga.load_config("configs/debug/debug.toml", keys)
run = quadriga.resolve(config)
print(f"{run.spec.steps} steps of {run.spec.tokens_per_step} tokens, in {run.spec.folders.dump}")

# %% What would it take on a GPU?
estimate = quadriga.estimate(run, "h100-80gb")
print(f"{estimate.worst.reserved / 2**30:.2f} GiB reserved, {estimate.to_dict()['step_time_s']:.3f} s per step")

# %% Build; this resumes from the newest checkpoint of the folder
trainer = quadriga.build(run, log=False)

# %% Train
losses = []
while not trainer.finished:
    metrics = trainer.step()
    losses.append(float(metrics.loss))
    print(f"step {metrics.step}: loss {metrics.loss:.4f}, grad norm {metrics.grad_norm:.3f}")

# %% Validate, save, and leave the process as it was
print(f"validation loss {trainer.evaluate():.4f}, saved in {trainer.save()}")
trainer.close()
