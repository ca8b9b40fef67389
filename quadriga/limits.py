"""The largest sizes, counts and depths that readers of untrusted files accept. Sizes are in bytes.

Every reader of a file that another program may have written takes its limits from here. They are far above what real
files need. A file beyond a limit is refused, with a message that names the limit.
"""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# JSON. Python's parser recurses once per level. Real files, of Quadriga and of others, nest less than 20 levels deep.
JSON_DEPTH = 100
JSON_BYTES = 64 * MIB  # one document: manifests, indexes, configurations, cards; traces have their own limit
JSON_DIGITS = 400  # of one number: enough for any float64 in full; longer conversions take quadratic time

# Text that is read line by line.
LINE_BYTES = 16 * MIB  # one line of a file
LOG_LINE_BYTES = MIB  # one line of metrics.jsonl or events.jsonl: those that Quadriga writes have less than 10 KiB
LOG_BYTES = GIB  # a whole metrics.jsonl or events.jsonl: 2 million steps, each of them logged
LOG_LINES = 3_000_000  # of one such file: read into 3 GB at most

DRY_RUN_HASHED_BYTES = 256 * MIB  # of a checkpoint that a dry run verifies: some tenths of a second

TOML_BYTES = 4 * MIB  # one configuration file
README_BYTES = MIB  # the README.md next to a configuration
EXTENDS = 20  # configuration files that extend one another
TOML_PROBLEMS = 100  # of one configuration; then the search for problems ends
TEXT, PATH, PATH_PART = 1 << 16, 4096, 255  # characters of a value, of one that is a path (Linux), and of a name in it
TOML_INTEGER = 1 << 63  # TOML's integers have 64 bits
DEVICE_FIGURES = (1e-3, 1e9)  # TFLOP/s, GB and GB/s in a user's device file
CSV_BYTES = 16 * MIB  # one pipeline schedule
CSV_PROBLEMS = 20  # printed problems of one schedule

# Values of a configuration. A dry run works through layers, stages and micro-batches one by one, and its figures are
# products of many keys. These limits keep it within seconds, and the figures within float64.
MIXTURE_SOURCES = 1000  # of one run: a record of metrics.jsonl has their counts
TRAINING_TOKENS = 1 << 53  # that a table of the configuration names
COUNT = 10**9  # steps, rows, tokens, and every number that is not named below
SECONDS = 10**8  # three years: the range of timers and timeouts
LAYERS = 1024  # of a model; the largest published ones have less than 130
DEGREE = 1 << 17  # ranks along one axis; the largest clusters have 2^17 GPUs
STAGE_PASSES = 1 << 14  # passes of one step through the stages of a pipeline, on all its ranks

# One message of a rank to the others (`json_collectives`). The largest is the plan of a checkpoint: 1 M chunks are
# about 200 MB of JSON.
RANK_MESSAGE_BYTES = 1 * GIB

RANKS = 1_000_000  # of one run, in the records that it leaves; far more than any run has had

# Reports of ranks in the rendezvous store (`resilience.hang_report`): a heartbeat is about 300 bytes, a hang report is
# two of them and a number for each silent rank. A stack is that of all threads, written by faulthandler.
HEARTBEAT_BYTES = 4 * KIB
HANG_REPORT_BYTES = 1 * MIB
STACK_BYTES = 1 * MIB

# Tokenizers. The largest published files are 34 MB (tokenizer.json) and 4 MB (tiktoken), with 262,144 ids.
TOKENIZER_BYTES = 64 * MIB
RANKS_BYTES = 16 * MIB  # tokenizer.model in tiktoken's form
TOKEN_BYTES = 1024  # one token of tiktoken's form; published ones have up to 128
VOCABULARY = 1 << 24  # ids

# A model that a Hugging Face config.json describes. The largest published Llama has 126 layers, 16,384 wide.
MODEL_LAYERS = 10_000
MODEL_WIDTH = 1 << 24  # of hidden states and of the feed-forward part; also the limit of positions

# Training data.
DOCUMENT_BYTES = 64 * MIB  # one line of JSON lines, one cell of a Parquet column; a long book is 5 MB
LINES_COUNTED = 64 * MIB  # of a data file, read to name a line in a message, perhaps between two steps: 0.1 s
LINES_COUNTED_PACKED = 16 * MIB  # the same of a compressed file, after decompression
LINE_SKIPPED_BYTES = GIB  # of a longer line, read to find its end; beyond, the file counts as one without lines
BLANK_LINES = 10_000_000  # in a row in JSON lines: some seconds of reading
DATA_FILES = 1 << 20  # files and folders below one `dataset_path`
BAD_RECORDS_IN_A_ROW = 100_000  # skipped by one row of the batch (`on_bad_record`); beyond, it is not a data set
PARQUET_FOOTER_BYTES = 256 * MIB  # the metadata of one Parquet file: some 100,000 row groups of 10 columns
PARQUET_ROWS = 1 << 40  # in one Parquet file

# Files of token ids.
TOKEN_FILES_OPEN = 256  # at a time; there can be any number of files
TOKEN_ROW_GROUP = 1 << 26  # ids, or rows, of one row group of Parquet, which is decoded whole: 512 MiB of int64
TOKEN_EMPTY_DOCUMENTS = 1 << 20  # documents without ids within one range of ids, each of which is read
TOKEN_CACHE_BYTES = 256 * MIB  # decoded row groups that are kept, besides the newest one
ARROW_METADATA_BYTES = 16 * MIB  # of one message or footer of an Arrow file; a batch of 10 columns has 1 KiB
ARROW_BATCH_BYTES = 1024 * MIB  # of one record batch with texts that cannot be read in place
ARROW_BATCHES = 1 << 20  # record batches of one Arrow file; the library `datasets` writes 1,000 rows in each
NPY_HEADER_BYTES = 10_000  # of a NumPy file; real ones have 128

# The plan of a checkpoint's tensors (`checkpoint.plan`). 1 M chunks are 50 MB of JSON, or a `.metadata` of 150 MB. The
# largest published model (405 B parameters on 1,024 ranks) has 3.5 M.
PLAN_BYTES = GIB  # of plan.json
PLAN_CHUNKS = 8_000_000
PLAN_NAME = 4096  # characters of a tensor's name
PLAN_DIMENSIONS = 64  # of a tensor, as in PyTorch
PLAN_TENSOR_BYTES = 1 << 50  # of one tensor; also the largest size of one of its dimensions
METADATA_BYTES = 768 * MIB  # of a `.metadata`, which is read if there is no plan.json
METADATA_VALUES = 80_000_000  # objects in it; a chunk has 6, and 15 entries of the pickle's memo
METADATA_STACK = 1 << 18  # values on the stack of its interpreter; pickles are written in batches of 1,000
METADATA_TUPLE = 256  # values in one of its tuples: dimensions, or parts of a path
METADATA_DEPTH = 64  # of its open lists, dicts and tuples; a plan nests 8 deep
SHARD_PICKLE_BYTES = 64 * KIB  # of the pickle that describes one tensor; torch writes 200 bytes
SHARD_RECORDS = 32  # of the archive of one tensor; torch writes 7
BATCH_ROWS = 1 << 20  # of the global batch of a saved run, which a conversion reads; the largest have 65,536
OBJECT_BYTES = 16 * MIB  # of one value that is not a tensor, in a checkpoint of another trainer
OBJECT_NUMBER_BYTES = 64 * KIB  # the same of a number; torch.save writes 1 KiB for it
OBJECT_OPCODES = 2_000_000  # of its pickle: one per value. A long book in the state of a data loader is 1.3 M token ids

# Traces of a profiler: 300 MB have about a million events.
TRACE_BYTES = 8 * GIB  # of one file, unpacked
TRACE_RATIO, TRACE_SMALL = 200, 64 * MIB  # unpacked by packed bytes (traces have 8 to 30), for files beyond the second
TRACE_VALUE = 16 * MIB  # characters of one event, and of everything else; the metadata of a run has 1 MiB
TRACE_ROWS = 10_000_000  # events that are read from one file, at 60 bytes each
TRACE_CALLS = 500_000  # events whose arguments are kept: collectives and look-ups, at 2 KB each
TRACE_NAMES = 1_000_000  # different names of one file
TRACE_NAME = 4_000  # characters of a name that are read; templates of C++ have some 3,000
TRACE_STEPS = 10_000  # profiled steps of one file
CCL_CARD_BYTES = 256 * KIB  # a card of CCL-Bench; published ones have 4 KiB, and YAML is slow to read
