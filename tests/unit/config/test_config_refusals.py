"""Wrong configurations, one a kind: the report names file and line, key, value, what is allowed, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Wrong:
    """A TOML text, and what its report must say, all of it in one problem."""

    name: str
    toml: str
    says: tuple[str, ...]
    ranks: int = 1


WRONG = [
    Wrong(
        "typo in a table",
        "[trainning]\nsteps = 5",
        (
            "trainning.steps = 5",
            "[run.toml, line 2]",
            "no table [trainning]",
            "did you mean: [training]",
            "allowed: tables:",
        ),
    ),
    Wrong(
        "empty table that is not there",
        "[optimiser]",
        ("optimiser", "[run.toml, line 1]", "no table", "did you mean: [optimizer]"),
    ),
    Wrong(
        "typo in a key",
        "[training]\nlocal_batch_sise = 4",
        (
            "training.local_batch_sise = 4",
            "[run.toml, line 2]",
            "did you mean: training.local_batch_size",
            "keys of [training]",
        ),
    ),
    Wrong(
        "key of another table",
        "[training]\n\nweight_decay = 0.2",
        ("training.weight_decay = 0.2", "[run.toml, line 3]", "did you mean: optimizer.weight_decay"),
    ),
    Wrong(
        "key outside of every table",
        "steps = 5\n[job]",
        (
            "steps = 5",
            "[run.toml, line 1]",
            "outside every table",
            "did you mean: training.steps",
            "to do: put it into the table",
        ),
    ),
    Wrong(
        "typo in a nested table",
        "[quantize.linear.float9]\nemulate = true",
        ("quantize.linear.float9.emulate = true", "did you mean: [quantize.linear.float8]"),
    ),
    Wrong(
        "value where a table is needed",
        "[training]\ndataloader = 4",
        ("training.dataloader = 4", "this is a table", "num_workers, persistent_workers"),
    ),
    Wrong(
        "text where a number is needed",
        '[optimizer]\nlr = "abc"',
        ('optimizer.lr = "abc"', "[run.toml, line 2]", "wrong type: text", "allowed: a number above 0"),
    ),
    Wrong(
        "number in quotes",
        '[training]\nsteps = "200"',
        ('training.steps = "200"', "wrong type: text", "allowed: a whole number of at least 1"),
    ),
    Wrong("fraction for a count", "[training]\nsteps = 1.5", ("training.steps = 1.5", "wrong type: a number")),
    Wrong("switch for a count", "[training]\nsteps = true", ("training.steps = true", "wrong type: true or false")),
    Wrong(
        "number for a switch",
        "[compile]\nenable = 1",
        ("compile.enable = 1", "wrong type: a whole number", "allowed: true or false"),
    ),
    Wrong(
        "list of the wrong things",
        "[compile]\ncomponents = [1]",
        ("compile.components = [1]", "unknown value 1", 'a list of "model" | "loss"'),
    ),
    Wrong("below its range", "[training]\nseq_len = 0", ("training.seq_len = 0", "out of range", "at least 1")),
    Wrong("above its range", "[optimizer]\nbeta1 = 1.0", ("optimizer.beta1 = 1.0", "out of range", "below 1")),
    Wrong("zero where -1 means all", "[validation]\nsteps = 0", ("validation.steps = 0", "-1, or a whole number")),
    Wrong("not a number", "[optimizer]\nlr = nan", ("optimizer.lr = nan", "not a finite number")),
    Wrong(
        "unknown choice",
        '[lr_scheduler]\ndecay_type = "cosin"',
        ('lr_scheduler.decay_type = "cosin"', '"linear" | "sqrt" | "cosine"', "did you mean: cosine"),
    ),
    Wrong(
        "unknown item of a list",
        '[checkpoint]\nexclude_from_loading = ["optimiser"]',
        ('unknown value "optimiser"', "did you mean: optimizer", "checkpoint.exclude_from_loading"),
    ),
    Wrong(
        "recompute option",
        '[activation_checkpoint]\nselective_ac_option = "-1"',
        ('activation_checkpoint.selective_ac_option = "-1"', 'such as "op" or "2"'),
    ),
    Wrong(
        "not TOML",
        "[training\nsteps = 5",
        ("run.toml, line 1", "this is not TOML"),
    ),
    Wrong("key said twice", "[training]\nsteps = 5\nsteps = 6", ("run.toml, line 3", "this is not TOML")),
    Wrong(
        "model family",
        '[model]\nname = "lama3"',
        ('model.name = "lama3"', "[run.toml, line 2]", "allowed: llama3", "did you mean: llama3"),
    ),
    Wrong(
        "model size",
        '[model]\nflavor = "8b"',
        ('model.flavor = "8b"', "debugmodel, 1B, 3B, 8B, 70B, 405B"),
    ),
    Wrong(
        "degrees against ranks",
        "[parallelism]\ndata_parallel_replicate_degree = 2\ndata_parallel_shard_degree = 3",
        (
            "parallelism.data_parallel_replicate_degree (2) x parallelism.data_parallel_shard_degree (3)",
            "[run.toml, lines 2, 3]",
            "multiply to 6, and there are 4 ranks",
            "start 6 ranks (NGPU=6 on one machine), or",
            "parallelism.data_parallel_shard_degree = -1 takes",
        ),
        ranks=4,
    ),
    Wrong(
        "one rank's degrees on two ranks",
        "[parallelism]\ndata_parallel_shard_degree = 1",
        ("multiply to 1, and there are 2 ranks", "start 1 rank (NGPU=1 on one machine), or"),
        ranks=2,
    ),
    Wrong(
        "ranks that the other degrees do not divide",
        "[parallelism]\ndata_parallel_replicate_degree = 3",
        (
            "4 ranks cannot be divided by 3",
            "a multiple of 3",
            "start 3 ranks (NGPU=3 on one machine), or change the degrees",
        ),
        ranks=4,
    ),
    Wrong(
        "width against heads",
        "[model]\nn_heads = 15\nn_kv_heads = 15",
        ("model.dim = 256 and model.n_heads = 15", "the heads must divide the width", "such as 8 or 16"),
    ),
    Wrong("odd heads", "[model]\nn_heads = 256\nn_kv_heads = 256", ("need heads of even width, not 1",)),
    Wrong(
        "key and value heads",
        "[model]\nn_kv_heads = 3",
        ("model.n_heads = 16 and model.n_kv_heads = 3", "must divide the query heads", "such as 2 or 4"),
    ),
    Wrong(
        "tokenizer larger than the model",
        "[model]\nvocab_size = 100",
        ("model.vocab_size = 100 and model.hf_assets_path", "258 ids", "set model.vocab_size to 258 or more"),
    ),
    Wrong(
        "global batch",
        "[training]\nlocal_batch_size = 2\nglobal_batch_size = 9",
        (
            "training.global_batch_size = 9 and training.local_batch_size = 2",
            "parallelism.data_parallel_shard_degree = -1 (here 2)",
            "[run.toml, lines 3, 2; default]",
            "a multiple of 4",
        ),
        ranks=2,
    ),
    Wrong(
        "recompute by budget without compile",
        '[activation_checkpoint]\nmode = "memory_budget"',
        ('activation_checkpoint.mode = "memory_budget" and compile.enable = false', "set compile.enable = true"),
    ),
    Wrong(
        "records of a recomputation by operation",
        '[activation_checkpoint]\nselective_ac_option = "op"\ndebug = true',
        (
            'activation_checkpoint.debug = true and activation_checkpoint.mode = "selective"',
            "[run.toml, lines 3, 2; default]",
        ),
    ),
    Wrong(
        "second moment that bfloat16 cannot move",
        '[optimizer]\nbeta2 = 0.999\nstate_dtype = "bfloat16"',
        (
            'optimizer.state_dtype = "bfloat16" and optimizer.beta1 = 0.9 and optimizer.beta2 = 0.999',
            "[run.toml, lines 3, 2; default]",
            "by 0.001 of its value per step",
            'set optimizer.state_dtype = "float32", or optimizer.stochastic_rounding = true, or optimizer.beta2 to',
        ),
    ),
    Wrong(
        "profiler longer than its cycle",
        "[profiling]\nenable_profiling = true\nprofile_freq = 7\nprofiler_warmup = 3\nprofiler_active = 5",
        (
            "profiling.profile_freq = 7 and profiling.profiler_warmup = 3 and profiling.profiler_active = 5",
            "set profiling.profile_freq to 8 or more",
        ),
    ),
    Wrong(
        "one save to keep",
        "[checkpoint]\nenable = true\nkeep_latest_k = 1",
        ("checkpoint.keep_latest_k = 1", "an older one must be kept", "0 (all), or 2 and more"),
    ),
    Wrong(
        "export without weights alone",
        '[checkpoint]\nenable = true\nlast_save_model_only = false\nexport_dtype = "bfloat16"',
        ('checkpoint.export_dtype = "bfloat16" and checkpoint.last_save_model_only = false',),
    ),
    Wrong(
        "weights of Hugging Face with an optimizer",
        '[checkpoint]\nenable = true\ninitial_load_in_hf = true\ninitial_load_path = "hf"\n'
        "initial_load_model_only = false",
        ("initial_load_in_hf = true and checkpoint.initial_load_model_only = false", "have no optimizer state"),
    ),
    Wrong(
        "weights of Hugging Face that lie nowhere",
        "[checkpoint]\nenable = true\ninitial_load_in_hf = true",
        ("no folder of weights is given", "set checkpoint.initial_load_path"),
    ),
    Wrong(
        "start from a later step",
        "[training]\nsteps = 10\n[checkpoint]\nenable = true\nload_step = 20",
        ("checkpoint.load_step = 20 and training.steps = 10",),
    ),
    Wrong(
        "initial weights with checkpoints off",
        '[checkpoint]\ninitial_load_path = "old"',
        ('checkpoint.enable = false and checkpoint.initial_load_path = "old"', "set checkpoint.enable = true"),
    ),
    Wrong(
        "two outputs in one folder",
        '[metrics]\nsave_tb_folder = "out"\n[checkpoint]\nfolder = "./out"',
        ("metrics.save_tb_folder", "checkpoint.folder", "share one folder"),
    ),
    Wrong("backend", '[comm]\nbackend = "ncl"', ('comm.backend = "ncl"', "allowed: gloo, nccl", "did you mean: nccl")),
    Wrong(
        "more gathers than buffers",
        '[comm]\nbackend = "nvshmem"\n[parallelism]\nfsdp_prefetch = 2',
        ("parallelism.fsdp_prefetch = 2", "buffers for one block ahead", "leave parallelism.fsdp_prefetch out"),
        ranks=2,
    ),
    Wrong("nothing to carry", '[comm]\nbackend = "nvshmem"', ("comm.backend", "shards none", "choose nccl")),
    Wrong(
        "device to plan for",
        '[estimate]\ndevice = "H1000"',
        ('estimate.device = "H1000"', "allowed: a100-40gb, a100-80gb", "did you mean: h100-80gb"),
    ),
    Wrong(
        "experts in a model without",
        "[parallelism]\nexpert_parallel_degree = 2",
        ("parallelism.expert_parallel_degree = 2", "no experts"),
    ),
    Wrong(
        "user code",
        '[experimental]\ncustom_import = "my.models"',
        ('experimental.custom_import = "my.models"', "cannot import code", "Python"),
    ),
    Wrong(
        "key of a fork",
        "[parallelism]\nenable_opus_backend = true",
        ("parallelism.enable_opus_backend = true", "[run.toml, line 2]", "[parallelism] has no such key"),
    ),
    Wrong(
        "removed key that would change the run",
        '[parallelism]\npipeline_parallel_split_points = ["layers.2"]',
        ("pipeline_parallel_split_points", "is not supported", "module_fqns_per_model_part"),
    ),
    Wrong(
        "old and new name side by side",
        "[training]\nseed = 1\n[debug]\nseed = 2",
        ("training.seed, debug.seed = 2", "[run.toml, line 4]", "keep only debug.seed"),
    ),
    Wrong(
        "unknown key of a moved table",
        "[float8]\nfilter_fqn = []",
        ("quantize.linear.float8.filter_fqn = []", "did you mean: quantize.linear.float8.filter_fqns"),
    ),
    Wrong(
        "converter",
        '[model]\nconverters = ["quantize.linear.mx"]',
        ('model.converters = ["quantize.linear.mx"]', "does not support microscaling formats"),
    ),
    Wrong(
        "missing tokenizer",
        '[model]\nhf_assets_path = "./assets/none"',
        ("model.hf_assets_path = ./assets/none", "no tokenizer is there", "scripts/download_hf_assets.py"),
    ),
    Wrong(
        "missing data",
        '[training]\ndataset = "text"\ndataset_path = "books/*.txt"',
        ("training.dataset_path = books/*.txt", "[run.toml, line 3]", "nothing is there", "relative to the directory"),
    ),
    Wrong(
        "data without a path",
        '[training]\ndataset = "jsonl"',
        ("training.dataset, training.dataset_path = jsonl", "no path is given"),
    ),
    Wrong(
        "unknown data",
        '[training]\ndataset = "buildin"',
        ("training.dataset = buildin", "[run.toml, line 2]", "allowed: arrow, builtin, ", "did you mean: builtin"),
    ),
    Wrong(
        "unknown data whose nearest name is torchtitan's",
        '[training]\ndataset = "c5_test"',
        ("training.dataset = c5_test", "c4, c4_test, c4_validation", "did you mean: c4_test"),
    ),
    Wrong(
        "unknown data with a path that tells",
        '[training]\ndataset = "shakespeare"\ndataset_path = "a.parquet"',
        ("training.dataset = shakespeare", "to read a.parquet, write parquet"),
    ),
    Wrong(
        "path for built-in data",
        '[training]\ndataset_path = "a.txt"',
        ("training.dataset, training.dataset_path", "has no path"),
    ),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_a_wrong_configuration_is_reported_in_one_problem(wrong, write, refusal):
    problems = refusal(write(wrong.toml), ranks=wrong.ranks)
    assert len(problems) == 1, "\n".join(map(str, problems))
    report = str(problems[0])
    for text in wrong.says:
        assert text in report, report


def test_all_problems_come_in_one_report(write, refusal):
    text = """
        [trainning]
        steps = 5
        [lr_scheduler]
        decay_type = "cosin"
        [model]
        n_heads = 256
        n_kv_heads = 256
        hf_assets_path = "./none"
    """
    reports = [str(problem) for problem in refusal(write(text), "--training.seq_len", "0")]
    assert len(reports) == 5
    for expected in ("trainning.steps", "cosin", "training.seq_len", "heads of even width", "no tokenizer is there"):
        assert any(expected in problem for problem in reports), reports


def test_a_refused_key_silences_the_rules_about_it_and_no_others(write, refusal):
    text = """
        [training]
        global_batch_size = "many"
        [profiling]
        enable_profiling = true
        profile_freq = 2
        profiler_active = 0
        [activation_checkpoint]
        mode = "memory_budget"
    """
    report = "\n".join(map(str, refusal(write(text))))
    assert "training.global_batch_size" in report
    assert "profiling.profiler_active = 0" in report
    assert "a cycle includes" not in report  # profiler_active is refused, so its length is not known
    assert "the compiler chooses what to recompute within the budget" in report


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--training.steps"], "needs a value"),
        (["--training.steps", "ten"], "training.steps = ten  [command line]"),
        (["--training.steps", "10", "20"], "20  [command line]"),
        (["training.steps=10"], "not a key of the configuration"),
        (["--help-me"], "not a key of the configuration"),
        (["--metrics.no_enable_wandb=true"], "takes no value"),
        (["--metrics.enable_wandb", "maybe"], "wrong type: text"),
        (["--training.no_steps"], "[training] has no such key"),
        (["--trainig.steps", "5"], "did you mean: [training]"),
        (["--compile.components", "model,los"], "did you mean: loss"),
    ],
)
def test_a_wrong_command_line_is_reported(arguments, says, refusal):
    assert says in "\n".join(map(str, refusal(*arguments)))


def test_the_environment_is_named_where_it_is_wrong(refusal):
    (problem,) = refusal(environ={"COMM_BACKEND": "glooo"})
    assert problem.source == "COMM_BACKEND"
    assert problem.nearest == "gloo"


def test_a_missing_file_says_what_is_there(write, refusal):
    write("", "configs/debug/debug.toml")
    report = str(refusal(write("", "x.toml").with_name("configs") / "debug" / "debgu.toml")[0])
    assert "no such file" in report
    assert "did you mean: configs/debug/debug.toml" in report
    assert "choose one of configs/debug/debug.toml" in report


def test_a_folder_or_bytes_are_no_configuration(tmp_path, refusal):
    assert "a folder, not a TOML file" in str(refusal(tmp_path)[0])
    (tmp_path / "latin.toml").write_bytes(b'[job]\ndescription = "caf\xe9"')
    assert "not UTF-8" in str(refusal(tmp_path / "latin.toml")[0])
