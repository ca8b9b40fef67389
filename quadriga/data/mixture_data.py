"""The data of a mixture: its token files, opened, and the share of each source in each stage. No torch.

The dry run opens and describes them as every rank does at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from quadriga.config.mixing import StageShares, format_percent, mixture_stages
from quadriga.config.schema import TOKENS, Training, TrainingSource
from quadriga.data.changes import SOURCES, STAGE, mixture_differences, other_kind
from quadriga.data.mixture import Mixture
from quadriga.data.token_data import open_tokens
from quadriga.data.token_files import TokenFiles
from quadriga.data.windows import Windows
from quadriga.errors import Problem, UserError
from quadriga.units import plural

S = TypeVar("S")
T = TypeVar("T")
TEXT_KEYS = ("dataset", "tokenizer")  # which a source of text compares itself; the table has the others
STEP = "step"  # the key of the number of finished steps among the positions of a checkpoint


@dataclass(frozen=True)
class MixtureData:
    """The sources in the order of the table, the token files of those that have any, and the order of all windows.

    `tokens`: by name, the files and their windows. `seed`, `global_batch_size` and `seq_len` are those of the run.
    """

    training: Training
    tokens: Mapping[str, tuple[TokenFiles, Windows]]
    mixture: Mixture
    seed: int
    global_batch_size: int
    seq_len: int

    @property
    def sources(self) -> tuple[TrainingSource, ...]:
        return self.training.sources

    @property
    def names(self) -> list[str]:
        return [source.title for source in self.sources]

    @property
    def texts(self) -> Iterator[TrainingSource]:
        """The sources that are tokenized."""
        return (source for source in self.sources if source.dataset != TOKENS)

    def fingerprint(self, texts: Mapping[str, str]) -> str:
        """Everything that determines the order of ids. `texts`: by name, the fingerprints of the sources of text."""
        dataloader, (first, *later) = self.training.dataloader, self.mixture.stages
        parts = {f"{name}: source": files.fingerprint for name, (files, _) in self.tokens.items()}
        parts |= {f"{name}: source": text for name, text in texts.items()}
        parts |= {f"{name}: share": format_percent(part) for name, part in zip(self.names, first.parts, strict=True)}
        parts |= {f"{STAGE}{stage.first}": self._format_stage(stage) for stage in later}
        parts |= {SOURCES: ", ".join(self.names), "shuffle": str(dataloader.shuffle).lower()}
        parts |= {"window_overlap": str(dataloader.window_overlap), "seed": str(self.seed)}
        parts |= {"global_batch_size": str(self.global_batch_size), "seq_len": str(self.seq_len)}
        if self.training.packing != "concat":
            parts["packing"] = self.training.packing
        return "; ".join(f"{key}={value}" for key, value in parts.items())

    def _format_stage(self, stage: StageShares) -> str:
        read = [f"{name} {format_percent(part)}" for name, part in zip(self.names, stage.parts, strict=True) if part]
        return ", ".join(read)

    def differences(
        self, state: Mapping[str, Any], here: str, of_text: Callable[[TrainingSource, Mapping[str, Any]], list[Problem]]
    ) -> list[Problem]:
        """Why the data differ from those of `state`, the state of a `MixtureLoader`.

        here: the fingerprint of this mixture. of_text: the differences of one source of text from its saved state.
        """
        if other := other_kind(state["fingerprint"], here):
            return other
        own = {f"{source.title}: source" for source in self.texts}  # files of text may have been repaired
        table = mixture_differences(state["fingerprint"], here, state["lanes"][STEP][0])
        found = [problem for problem in table if problem.where.partition("checkpoint: ")[2] not in own]
        for source in self.texts:
            if (saved := state["sources"].get(source.title)) is not None:
                changes = [problem for problem in of_text(source, saved) if problem.where.endswith(TEXT_KEYS)]
                found += [replace(problem, where=f"{problem.where} of {source.title}") for problem in changes]
        return found

    def describe(self, steps: int) -> list[str]:
        """What a run of so many steps reads: a line for all sources, and one for each."""
        heading = f"{plural(len(self.sources), 'source')} in windows of one source each"
        return [heading, *(self._describe_source(index, steps) for index in range(len(self.sources)))]

    def _describe_source(self, index: int, steps: int) -> str:
        source, windows = self.sources[index], int(self.mixture.windows_before(steps)[index])
        read = f"{plural(windows, 'window')}, {windows * self.seq_len:,} tokens"
        place = f"{source.dataset} from {source.dataset_path}" if source.dataset_path else source.dataset
        if source.title in self.tokens:
            files, order = self.tokens[source.title]
            read += f", {windows / order.count:.3g} epochs"
            place += f", {plural(len(files.files), 'file')}, {plural(files.length, 'id')}"
        asked = [f"{value:,} {name} asked for" for name, value in source.amounts.items() if name != "weight"]
        return f"{source.title}: {self._shares(index, steps)} {', '.join([read, *asked])}; {place}"

    def _shares(self, index: int, steps: int) -> str:
        """The share of a source; if there are several stages, with the windows of each."""
        stages = [stage for stage in self.mixture.stages if stage.first < steps]
        if len(stages) == 1:
            return f"{format_percent(stages[0].parts[index])},"
        ends = [*(stage.first for stage in stages[1:]), steps]
        before = [int(self.mixture.windows_before(step)[index]) for step in (0, *ends)]
        shares = []
        for stage, end, first, last in zip(stages, ends, before, before[1:], strict=False):
            windows = plural(last - first, "window")
            shares.append(f"{format_percent(stage.parts[index])} of steps {stage.first + 1:,} to {end:,} ({windows})")
        return f"{', '.join(shares)}; together"


def open_mixture(
    training: Training,
    *,
    seed: int,
    seq_len: int,
    global_batch_size: int,
    vocab_size: int | None,
    assets: str | None,
) -> MixtureData:
    """Opens the token files of a mixture, and computes its shares.

    vocab_size: of the model; None: the ids are not checked. assets: the path of the run's tokenizer.

    Raises UserError as `open_tokens`, with the problems of all sources.
    """
    read = [source for source in training.sources if source.dataset == TOKENS]

    def open_source_of(source: TrainingSource) -> tuple[TokenFiles, Windows]:
        own = f"{seed} {source.title}"  # so that two sources of one length have different orders
        order = source.token_keys, training.dataloader, seq_len, vocab_size
        how: dict[str, Any] = {"seed": own, "assets": assets, "document_mask": training.document_mask}
        return open_tokens(*order, endless=True, **how)

    tokens = dict(zip([source.title for source in read], collected(open_source_of, read), strict=True))
    sizes = {name: windows.count * seq_len for name, (_, windows) in tokens.items()}
    stages = mixture_stages(training, global_batch_size * seq_len, sizes)
    return MixtureData(training, tokens, Mixture(stages, global_batch_size, seed), seed, global_batch_size, seq_len)


def collected(call: Callable[[S], T], sources: Iterable[S]) -> Sequence[T]:
    """`call` of each source. Raises one UserError with the problems of all of them."""
    results: list[T] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            results.append(call(source))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return results
