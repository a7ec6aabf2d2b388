"""The one command: `w1train VERB ...` runs the module of the verb, as `python -m` does.

The verbs and their meanings are listed here, so that the list is printed without the import of a verb's module, which may take seconds.
This module imports nothing that takes time: until `main` has begun, Ctrl-C would be a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from w1train.runtime.ctrl_c import end_at_ctrl_c
from w1train.runtime.version import __version__

_WIDTH = 20


class Verb(NamedTuple):
    """A verb of the command."""

    module: str
    """The module that runs, or "" for a verb that has verbs of its own."""
    meaning: str
    """One line for the list."""


DATA_VERBS = {
    "train-tokenizer": Verb("data_tools.train_tokenizer", "train a tokenizer on text"),
    "import-tokenizer": Verb("data_tools.import_tokenizer", "import a tokenizer of another model"),
    "tokenize": Verb("data_tools.tokenize", "turn text into the token files of a run"),
    "conversations": Verb("data_tools.conversations", "turn conversations into token files for fine-tuning"),
    "inspect": Verb("data_tools.inspect", "show what token files contain"),
    "count-tokens": Verb("data_tools.count_tokens", "count how often each token id occurs"),
    "verify": Verb("data_tools.verify", "compare token files with their hashes"),
    "pack-report": Verb("data_tools.pack_report", "say how documents fill the samples of a run"),
    "build-packing": Verb("w1train.data.build_packing", "pack a large dataset before the run"),
    "python-corpus": Verb("data_tools.python_corpus", "write the sources of Python's library as a corpus"),
}
VERBS = {
    "train": Verb("w1train.launcher", "train a model on this machine, or resume its run"),
    "sample": Verb("w1train.sample", "generate text with a trained run"),
    "evaluate": Verb("w1train.evaluate", "score a checkpoint: validation, likelihoods"),
    "average": Verb("w1train.average", "average the best checkpoints of a run"),
    "convert": Verb("w1train.convert", "convert models from and to Hugging Face"),
    "plan": Verb("w1train.plan", "say whether a run fits on GPUs, and how fast it is"),
    "report": Verb("w1train.report", "write a page about a run, or one that compares runs"),
    "status": Verb("w1train.status", "say what runs are doing"),
    "doctor": Verb("w1train.doctor", "say what works on this machine, and how fast"),
    "dashboard": Verb("w1train.dashboard", "create a W&B workspace with charts of the runs"),
    "data": Verb("", "make tokenizers and token files (lists its verbs)"),
}
_OTHER_NAMES = {
    **dict.fromkeys(("pretrain", "fit", "run", "finetune", "fine-tune", "launch", "resume"), "train"),
    **dict.fromkeys(("generate", "infer", "inference", "predict", "complete", "chat"), "sample"),
    **dict.fromkeys(("eval", "validate", "score", "test"), "evaluate"),
    **dict.fromkeys(("export", "import", "to-hf", "from-hf"), "convert"),
    **dict.fromkeys(("merge", "ema"), "average"),
    **dict.fromkeys(("compare", "plot", "html"), "report"),
    **dict.fromkeys(("env", "check", "info"), "doctor"),
    **{name: f"data {name}" for name in DATA_VERBS},
}
"""Names that other programs have for a verb, or that a user may try, and the verb."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command (without arguments: that of this process). Return the exit status, or exit as the verb's own command does."""
    end_at_ctrl_c("w1train")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"w1train {__version__}")
        return 0
    if words[:1] == ["data"]:
        return _run("w1train data", DATA_VERBS, {}, words[1:])
    return _run("w1train", VERBS, _OTHER_NAMES, words)


def _run(program: str, verbs: Mapping[str, Verb], other_names: Mapping[str, str], words: list[str]) -> int:
    """Run the verb, which is the first word, with the words after it."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_list_of(program, verbs))
        return 0
    name, *arguments = words
    if name not in verbs:
        print(f"{program}: {_unknown(program, verbs, other_names, name)}", file=sys.stderr)
        return 2
    end_at_ctrl_c(f"{program} {name}")
    import runpy

    sys.argv = [f"{program} {name}", *arguments]
    runpy.run_module(verbs[name].module, run_name="__main__", alter_sys=True)
    return 0


def _list_of(program: str, verbs: Mapping[str, Verb]) -> str:
    lines = [f"  {name:<{_WIDTH - 2}}{verb.meaning}" for name, verb in verbs.items()]
    return "\n".join([f"usage: {program} VERB ...", "", *lines, "", f"`{program} VERB --help` explains a verb."])


def _unknown(program: str, verbs: Mapping[str, Verb], other_names: Mapping[str, str], name: str) -> str:
    if "=" in name and program == "w1train":
        return f"{name} is no verb; did you mean {program} train {name}?"
    from w1train.config.errors import closest

    match = other_names.get(name.lower()) or closest(name, verbs)
    if match is None and (other := closest(name, other_names)) is not None:
        match = other_names[other]
    meant = f"did you mean {program} {match}?" if match else f"the verbs are {', '.join(verbs)}"
    return f"there is no verb {name!r}; {meant}"
