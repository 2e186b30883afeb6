"""What a user may get wrong: each case ends with its code and a line with key, value and remedy."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from limits import WAIT_S

from ddp_sgd.errors import ExitCode
from ddp_sgd.host import free_port
from ddp_sgd.train import main

ROOT = Path(__file__).parent.parent
CONFIG, DATA, PEER = ExitCode.CONFIG, ExitCode.DATA, ExitCode.PEER
OUTPUT, DIVERGED, INTERNAL = ExitCode.OUTPUT, ExitCode.DIVERGED, ExitCode.INTERNAL
LAUNCHERS = ("SLURM_", "DDP_SGD_", "MASTER_")
TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}
SRUN = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}


def case(name, argv, code, *words, files=None, env=None, marks=()):
    return pytest.param(argv, code, words, files or {}, env or {}, id=name, marks=marks)


def wrong_value(setting, remedy, *argv):
    """A value out of its range; the message names key and value as they were written."""
    key, value = setting.split("=")
    return case(setting, [f"--{setting}", *argv], CONFIG, f"{key} is {value}; choose ", remedy)


def user_data(name, **init_args):
    """Options for a data set of ``user_code`` with samples of width 4, and a model that fits it."""
    train = json.dumps({"class_path": f"user_code.{name}", "init_args": init_args})
    return [f"--data.train={train}", "--data.eval=null", "--model.init_args.inputs=4"]


def curve(name, **init_args):
    """Option for a curve of ``user_code``."""
    component = {"class_path": f"user_code.{name}", "init_args": init_args}
    return f"--schedule.curve={json.dumps(component)}"


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def without(environment, *names, **extra):
    return {name: value for name, value in environment.items() if name not in names} | extra


ARRAYS = "--data.train={class_path: ddp_sgd.data.Arrays, init_args: {path: x.npz}}"
IMAGES = ("--data.train.init_args.shape=image", "--data.eval.init_args.shape=image")
NORMALIZED = "--model={class_path: ddp_sgd.models.ConvNet, init_args: {batch_norm: true}}"
ROWS, LABELS = np.zeros((5, 64), np.float32), np.zeros(5, np.int64)
BOMB = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
)

RANGES = [
    wrong_value("seed=-1", "such as 0"),
    wrong_value(f"seed={2**63}", "[0, 2^63), such as 0."),
    wrong_value("epochs=0", "at least 1"),
    wrong_value("data.batch_size=0", "at least 1"),
    wrong_value("data.accumulate=0", "at least 1"),
    wrong_value("data.workers=-1", "at least 0"),
    wrong_value("optim.lr=0", "above 0"),
    wrong_value("optim.lr=-0.1", "above 0"),
    wrong_value("optim.reference_batch=0", "at least 1"),
    wrong_value("optim.momentum=1.0", "[0, 1), such as 0.9"),
    wrong_value("optim.momentum=-0.5", "[0, 1), such as 0.9"),
    wrong_value("optim.weight_decay=-0.1", "at least 0"),
    wrong_value("optim.clip_norm=0", "above 0"),
    wrong_value("optim.clip_value=0", "above 0"),
    case(
        "two ways to clip",
        ["--optim.clip_value=1", "--optim.clip_norm=2"],
        CONFIG,
        "optim.clip_value is 1.0 while optim.clip_norm is 2.0; leave one of them out",
    ),
    wrong_value("schedule.warmup_epochs=-1", "auto"),
    wrong_value("schedule.warmup_start=0", "(0, 1]"),
    wrong_value("schedule.warmup_start=1.5", "(0, 1]"),
    wrong_value("schedule.gamma=0", "above 0", "--schedule.name=step", "--schedule.milestones=[1]"),
    wrong_value("schedule.power=0", "above 0", "--schedule.name=polynomial"),
    wrong_value("schedule.final=1.5", "[0, 1]"),
    wrong_value("schedule.peak_at=0", "(0, 1)", "--schedule.name=one_cycle"),
    wrong_value("schedule.peak_at=1", "(0, 1)", "--schedule.name=one_cycle"),
    wrong_value("schedule.momentum_start=1.0", "[0, 1) or null, such as 0.5"),
    wrong_value("schedule.warmup_steps=-1", "at least 0"),
    wrong_value("steps=0", "at least 1"),
    wrong_value("eval.every_epochs=0", "at least 1"),
    wrong_value("eval.every_steps=0", "at least 1"),
    wrong_value("log.every_steps=0", "at least 1"),
    wrong_value("parallel.bucket_mb=0", "above 0"),
    wrong_value("runtime.timeout_s=0", "(0, 86400]"),
    wrong_value("runtime.timeout_s=100000", "(0, 86400]"),
]

COMMAND_LINE = [
    case("unknown key", ["--optim.lrr=1"], CONFIG, "unknown key optim.lrr; did you mean optim.lr?"),
    case("unknown section", ["--optimm.lr=1"], CONFIG, "unknown key optimm", "did you mean optim"),
    case("unknown option", ["--verbose"], CONFIG, "unknown option --verbose; see --help."),
    case("option without value", ["--epochs"], CONFIG, "--epochs has no value; write --epochs="),
    case("word that stands alone", ["run.yaml"], CONFIG, "run.yaml", "write --config=run.yaml."),
    case("key without dashes", ["epochs=3"], CONFIG, "epochs=3", "write --epochs=3."),
    case("text for a number", ["--epochs=many"], CONFIG, "epochs is 'many'; choose", "at least 1"),
    case("real for a whole number", ["--epochs=1.5"], CONFIG, "epochs is 1.5; choose"),
    case("text for a switch", ["--optim.nesterov=on"], CONFIG, "optim.nesterov is 'on'", "true"),
    case("not a number", ["--optim.lr=.nan"], CONFIG, "optim.lr is nan; choose a finite number"),
    case("infinite", ["--optim.lr=.inf"], CONFIG, "optim.lr is inf; choose a finite number"),
    case("nearly a word", ["--schedule.name=cosin"], CONFIG, "'cosin'", "did you mean cosine?"),
    case("rule that does not exist", ["--optim.scaling=cubic"], CONFIG, "'cubic'", "linear, sqrt"),
    case(
        "nothing to resume",
        ["--resume=must"],
        DATA,
        "digits holds no checkpoint that is whole; set resume=auto",
    ),
    case(
        "no such checkpoint", ["--resume=gone.pt"], DATA, "gone.pt is not there; name a checkpoint"
    ),
    case("folder in a name", ["--name=../elsewhere"], CONFIG, "name is '../elsewhere'; choose"),
    case("slash in a name", ["--name=a/b"], CONFIG, "name is 'a/b'; choose"),
    case("name of dots", ["--name=.."], CONFIG, "name is '..'", "use a letter or a digit."),
    case("empty folder", ["--output_dir="], CONFIG, "output_dir is ''; choose"),
    case("no such home", ["--output_dir=~no_such_user"], CONFIG, "name a user who has a home"),
    case(
        "two lengths",
        ["--steps=10", "--epochs=5"],
        CONFIG,
        "epochs is 5 while steps is 10; leave one of them out, or set steps=null.",
    ),
    case(
        "steps of other ranks",
        ["--steps=10", "--on_resize=rescale"],
        CONFIG,
        "on_resize is rescale while steps is 10, and other ranks would take steps of another size",
    ),
    case(
        "momentum along no warm-up",
        ["--schedule.momentum_start=0.5"],
        CONFIG,
        "schedule.momentum_start is 0.5 while the run has no warm-up; set schedule.warmup_epochs=3",
    ),
    case(
        "curve that is negative somewhere",
        [curve("BadCurve", at=300, value=-0.5)],
        CONFIG,
        "schedule.curve is -0.5 for step=300, steps_per_epoch=45, total_steps=900; return a finite",
    ),
    case(
        "curve that is not finite at the end",
        [curve("BadCurve", at=899, value="=inf")],
        CONFIG,
        "schedule.curve is inf for step=899",
    ),
    case(
        "curve that raises",
        [curve("BadCurve", at=300, value="raise")],
        CONFIG,
        "schedule.curve raises RuntimeError: no such step, for step=300",
    ),
    case(
        "curve with a memory", [curve("Counting")], CONFIG, "schedule.curve is not the same twice"
    ),
    case(
        "curve beside a name",
        [curve("Triangle"), "--schedule.name=linear"],
        CONFIG,
        "schedule.name is linear while schedule.curve is user_code.Triangle; leave schedule.name",
    ),
    case(
        "nesterov without momentum",
        ["--optim.nesterov=true", "--optim.momentum=0"],
        CONFIG,
        "optim.nesterov is true while optim.momentum is 0; set optim.momentum=0.9",
    ),
    case(
        "no milestones",
        ["--schedule.name=step"],
        CONFIG,
        "schedule.milestones is empty while schedule.name is step; name epochs",
    ),
    case(
        "milestones out of order",
        ["--schedule.name=step", "--schedule.milestones=[9, 3]"],
        CONFIG,
        "schedule.milestones is [9.0, 3.0]; put the epochs in ascending order",
    ),
    case(
        "argument of another curve",
        ["--schedule.gamma=0.5"],
        CONFIG,
        "schedule.gamma is 0.5 while schedule.name is cosine; set schedule.name=step",
    ),
    case(
        "two rises",
        ["--schedule.name=one_cycle", "--schedule.warmup_epochs=2"],
        CONFIG,
        "schedule.warmup_epochs is 2.0 while schedule.name is one_cycle",
    ),
    case(
        "several faults at once",
        ["--epochs=0", "--optim.lr=0", "--modle=1"],
        CONFIG,
        "epochs is 0; ",
        " | optim.lr is 0; ",
        " | unknown key modle; did you mean model?",
    ),
    case(
        "peak rate beyond numbers",
        ["--optim.lr=1e308", "--optim.reference_batch=1"],
        CONFIG,
        "optim.lr is 1e+308, which the rule linear takes to inf",
        "choose a rate nearer to 0.1.",
    ),
    case(
        "unknown variable",
        [],
        CONFIG,
        "unknown key optim.lrr (set in DDP_SGD_OPTIM__LRR); did you mean optim.lr?",
        env={"DDP_SGD_OPTIM__LRR": "1"},
    ),
    case(
        "wrong value in a variable",
        [],
        CONFIG,
        "epochs is 'x'; choose",
        "(set in DDP_SGD_EPOCHS)",
        env={"DDP_SGD_EPOCHS": "x"},
    ),
]

FILES = [
    case("missing file", ["--config=run.yaml"], CONFIG, "run.yaml does not exist; name a YAML"),
    case(
        "nearly the name of a file",
        ["--config=rnu.yaml"],
        CONFIG,
        "rnu.yaml does not exist; did you mean run.yaml?",
        files={"run.yaml": "epochs: 3"},
    ),
    case("folder for a file", ["--config=."], CONFIG, ". is a folder; name a YAML file in it."),
    case(
        "bad YAML",
        ["--config=run.yaml"],
        CONFIG,
        "run.yaml line 3 is not YAML",
        "check its brackets",
        files={"run.yaml": "epochs: 3\noptim: {lr: 1\nname: x\n"},
    ),
    case(
        "not a mapping",
        ["--config=run.yaml"],
        CONFIG,
        "run.yaml line 1 is a list, not a mapping; write lines of the form `key: value`.",
        files={"run.yaml": "- epochs\n- 3\n"},
    ),
    case(
        "duplicate key",
        ["--config=run.yaml"],
        CONFIG,
        "run.yaml line 2 repeats the key epochs of line 1; keep one of the two.",
        files={"run.yaml": "epochs: 3\nepochs: 4\n"},
    ),
    case(
        "two documents",
        ["--config=run.yaml"],
        CONFIG,
        "run.yaml line 2 starts a second document; keep one document",
        files={"run.yaml": "epochs: 3\n---\nepochs: 4\n"},
    ),
    case(
        "alias bomb",
        ["--config=run.yaml"],
        CONFIG,
        "run.yaml line 5 makes more than 100000 values, aliases expanded; write less.",
        files={"run.yaml": BOMB},
    ),
    case(
        "tag",
        ["--config=run.yaml"],
        CONFIG,
        "run.yaml line 1 has the tag !!python/object",
        "write plain data",
        files={"run.yaml": "name: !!python/object/apply:os.system [ls]\n"},
    ),
    case(
        "not UTF-8",
        ["--config=run.yaml"],
        CONFIG,
        "run.yaml line 2 is not UTF-8; save the file as UTF-8.",
        files={"run.yaml": b"epochs: 3\nname: caf\xe9\n"},
    ),
    case(
        "number for text",
        ["--config=run.yaml"],
        CONFIG,
        "name is 7; choose",
        'quote it to make it text: "7" (set in run.yaml).',
        files={"run.yaml": "name: 7"},
    ),
    case(
        "wrong value in a file",
        ["--config=run.yaml"],
        CONFIG,
        "epochs is 0; choose",
        "(set in run.yaml)",
        files={"run.yaml": "epochs: 0"},
    ),
]

COMPONENTS = [
    case("name without a dot", ["--model.class_path=MLP"], CONFIG, "model.class_path is 'MLP'"),
    case("text for a component", ["--model=torch.nn.Linear"], CONFIG, "model.class_path=torch.nn"),
    case(
        "unknown module",
        ["--model.class_path=no_such_package.Net"],
        CONFIG,
        "model.class_path is no_such_package.Net, but there is no module no_such_package; install",
    ),
    case(
        "unknown class",
        ["--model.class_path=ddp_sgd.models.MPL"],
        CONFIG,
        "model.class_path is ddp_sgd.models.MPL, but ddp_sgd.models has no MPL; did you mean MLP?",
    ),
    case(
        "not a class",
        ["--model.class_path=user_code.NOT_CALLABLE"],
        CONFIG,
        "model.class_path is user_code.NOT_CALLABLE, a int; name a class or a function, or set",
    ),
    case(
        "unknown argument",
        ["--model.init_args.hiden=[8]"],
        CONFIG,
        "model.init_args.hiden is not an argument of ddp_sgd.models.MLP; did you mean hidden?",
        "it accepts (inputs, hidden, classes).",
    ),
    case(
        "too many positional arguments",
        ["--model.args=[1, 2, 3]", "--model.class_path=torch.nn.Flatten"],
        CONFIG,
        "model.args is [1, 2, 3] while torch.nn.Flatten says: too many positional arguments; it",
        "accepts (start_dim, end_dim).",
    ),
    case(
        "argument by position and by name",
        ["--model.args=[64]"],
        CONFIG,
        "model.args is [64] and model.init_args is ['classes', 'hidden', 'inputs'] while ",
        "multiple values for argument 'inputs'; it accepts (inputs, hidden, classes).",
    ),
    case(
        "unknown argument of a function that is not called yet",
        [
            "--loss={class_path: torch.nn.functional.cross_entropy, call: false, init_args: "
            "{label_smoothin: 0.1}}"
        ],
        CONFIG,
        "loss.init_args.label_smoothin is not an argument of torch.nn.functional.cross_entropy;",
        "did you mean label_smoothing?",
    ),
    case("value for a list", ["--model.args=3"], CONFIG, "model.args is 3; choose a list."),
    case("text for call", ["--loss.call=no"], CONFIG, "loss.call is 'no'; choose true or false."),
    case(
        "class in the place of a loss",
        ["--loss.call=false"],
        CONFIG,
        "loss is a type; name a module or function of (outputs, targets).",
    ),
    case(
        "class in the place of a model",
        ["--model.call=false", "--model.class_path=ddp_sgd.models.MLP", "--model.init_args={}"],
        CONFIG,
        "model is a ",
        "name a torch.nn.Module",
    ),
    case(
        "missing argument",
        ["--model.class_path=torch.nn.Linear", "--model.init_args.in_features=64"],
        CONFIG,
        "model.init_args is ['in_features'] while torch.nn.Linear says: missing",
        "it accepts (in_features, out_features",
    ),
    case(
        "argument of a wrong type",
        ["--model.init_args.inputs=wide"],
        CONFIG,
        "model is ddp_sgd.models.MLP, which failed with TypeError",
        "check model.init_args",
    ),
    case(
        "constructor that raises",
        ["--model.class_path=user_code.Unbuildable"],
        CONFIG,
        "model is user_code.Unbuildable, which failed with ValueError: width is odd; check",
    ),
    case(
        "model of the wrong kind",
        ["--model.class_path=user_code.Plain"],
        CONFIG,
        "model is a Plain; name a torch.nn.Module",
    ),
    case(
        "model without weights",
        ["--model.class_path=user_code.Weightless"],
        CONFIG,
        "model is Weightless without a parameter to train; name a module",
    ),
    case(
        "model for other inputs",
        ["--model.init_args.inputs=32"],
        CONFIG,
        "model is MLP, which fails on inputs of float32 of shape (8, 64) in training mode",
        "make model.init_args fit the data",
    ),
    case(
        "outputs that do not fit the targets",
        ["--loss.class_path=torch.nn.BCEWithLogitsLoss"],
        CONFIG,
        "the model gives float32 of shape (8, 10) in training mode",
        "which does not fit targets of int64 of shape (8,)",
        "change the last layer",
    ),
    case(
        "two outputs",
        ["--model.class_path=user_code.TwoOutputs"],
        CONFIG,
        "the model gives a tuple of (float32 of shape (8, 10), float32 of shape (8, 10)) in",
    ),
    case(
        "loss of the wrong kind",
        ["--loss.class_path=user_code.Plain"],
        CONFIG,
        "loss is a Plain; name a module or function of (outputs, targets).",
    ),
    case(
        "function for a loss",
        ["--loss.class_path=torch.nn.functional.cross_entropy"],
        CONFIG,
        "loss.init_args is [] while torch.nn.functional.cross_entropy says: missing",
        "or set loss.call=false to take it without a call.",
    ),
    case(
        "loss that sums",
        ["--loss={class_path: torch.nn.CrossEntropyLoss, init_args: {reduction: sum}}"],
        CONFIG,
        "loss.init_args.reduction is sum; leave it at mean",
    ),
    case(
        "loss that gives a vector",
        ["--loss.class_path=user_code.vector_loss"],
        CONFIG,
        "loss is _per_sample, which gives float32 of shape (8,); let it give the mean",
    ),
    case(
        "loss without units",
        ["--loss={class_path: user_code.Terms, init_args: {units: 0}}"],
        CONFIG,
        "loss.units gives 0 for a batch of the first samples, which then count for nothing; let it",
    ),
    case(
        "loss with negative units in a step",
        ["--loss={class_path: user_code.Terms, init_args: {later: -2}}"],
        CONFIG,
        "loss.units gives -2; let it give a finite number that is at least 0.",
    ),
    case(
        "loss with units of other names",
        ["--loss={class_path: user_code.Terms, init_args: {units: {fit: 1}}}"],
        CONFIG,
        "loss.units gives the names fit, while loss gives the names fit, size; let it give",
    ),
    case(
        "loss with other names in a step",
        ["--loss={class_path: user_code.Terms, init_args: {calls: 30}}", "--data.eval=null"],
        CONFIG,
        "loss gives the names fit while it gave the names fit, size before the run; let it give",
    ),
    case(
        "model without a loss where there is to be none",
        ["--loss=null", "--data.eval=null"],
        CONFIG,
        "model is MLP, which fails on inputs of",
    ),
    case(
        "model without a loss in evaluation mode",
        ["--loss=null", "--model={class_path: user_code.OwnLoss, init_args: {scores: true}}"],
        CONFIG,
        "loss is null while the model gives float32 of shape (8, 10) in evaluation mode; set "
        "data.eval=null",
    ),
    case(
        "accuracy of no classification",
        ["--loss=null", "--model.class_path=user_code.OwnLoss", "--log.train_accuracy=true"],
        CONFIG,
        "log.train_accuracy is true while the model gives",
        "set log.train_accuracy=false.",
    ),
    case(
        "loss that gives text",
        ["--loss.class_path=user_code.text_loss"],
        CONFIG,
        "which gives a str; let it give the mean",
    ),
    case(
        "batch normalization of one sample",
        [NORMALIZED, *IMAGES, "--data.batch_size=4"],
        CONFIG,
        "data.batch_size is 4 with world size 1",
        "too few for the batch normalization of ConvNet; set data.tail=drop",
    ),
    case(
        "model that fails in training",
        ["--model.class_path=user_code.FailsInTraining"],
        CONFIG,
        "model is FailsInTraining, which fails on inputs of float32 of shape (8, 64) in training",
        "RuntimeError: no luck",
    ),
    *(
        case(
            f"too little memory in pass {first} of {mode}",
            [f"--model={{class_path: user_code.Hungry, init_args: {{{mode}: {first}}}}}"],
            CONFIG,
            f"{what} is too large for the memory of the host: ",
            remedy,
        )
        for mode, what, remedy, first in (
            (
                "training",
                "data.batch_size",
                "lower data.batch_size and raise data.accumulate by",
                1,
            ),
            ("evaluation", "data.batch_size where it is null,", "set a smaller eval.batch_size", 1),
            (
                "evaluation",
                "data.batch_size where it is null,",
                "set a smaller eval.batch_size",
                10,
            ),
        )
    ),
    case(
        "too little memory in pass 10 of training",
        ["--model={class_path: user_code.Hungry, init_args: {training: 10}}"],
        CONFIG,
        "data.batch_size is 32, a micro-batch that is too large for the memory of the host: ",
        "set data.batch_size=16 data.accumulate=2, which keeps the steps the same",
    ),
    case(
        "too little memory for the model",
        [
            "--model={class_path: torch.nn.Linear, init_args: {in_features: 64, "
            "out_features: 1000000000000}}"
        ],
        CONFIG,
        "model is too large for the memory of the host: ",
        "make it smaller, start fewer ranks on a host, or take one with more memory.",
    ),
]

DATA_SETS = [
    case(
        "data of the wrong kind",
        ["--data.train.class_path=user_code.Plain"],
        CONFIG,
        "data.train is a Plain, which has no length or no samples by index; name a map-style",
    ),
    case(
        "stream",
        user_data("Stream"),
        CONFIG,
        "data.train is a Stream",
        "streaming data sets are not supported",
    ),
    case(
        "stream with a length",
        user_data("StreamWithLength"),
        CONFIG,
        "data.train is a StreamWithLength",
        "streaming data sets are not supported",
    ),
    case(
        "no samples",
        user_data("Zeros", samples=0),
        DATA,
        "data.train is empty; name a data set with at least one sample.",
    ),
    case(
        "no held-out samples",
        ["--data.eval={class_path: user_code.Zeros, init_args: {samples: 0}}"],
        DATA,
        "data.eval is empty; name a data set with at least one sample.",
    ),
    case(
        "held-out samples of another shape",
        ["--data.eval={class_path: user_code.Zeros, init_args: {width: 63}}"],
        CONFIG,
        "model is MLP, which fails on inputs of float32 of shape (8, 63)",
    ),
    case(
        "split that does not exist",
        ["--data.train.init_args.split=test"],
        DATA,
        "split is 'test'; choose train or eval.",
    ),
    case(
        "label too large",
        ["--model.init_args.classes=7"],
        DATA,
        "data.train has labels from 0 to 9 while the model gives 7 scores",
        "give the model 10 classes.",
    ),
    case(
        "negative label",
        user_data("Zeros", label=-3),
        DATA,
        "data.train has labels from -3 to -3 while the model gives 10 scores; number the labels",
    ),
    case(
        "late label",
        user_data("LateLabel", samples=64),
        DATA,
        "a batch has a label that the model has no score for: Target 99 is out of bounds",
        "number the labels from 0",
    ),
    case(
        "sample that cannot be read",
        user_data("RaisesAt", at=5),
        DATA,
        "data.train[5] cannot be read, OSError: the disk is gone; fix or remove that sample.",
    ),
    case(
        "sample that a worker cannot read",
        [*user_data("RaisesAt", at=5), "--data.workers=1"],
        DATA,
        "data.train[5] cannot be read, OSError: the disk is gone; fix or remove that sample.",
    ),
    case(
        "samples of different shapes",
        user_data("Ragged"),
        DATA,
        "data.train[0] has the shape ",
        "which form no batch; give all samples the same shapes and keys, such as by padding",
    ),
    case(
        "mapping for a sample",
        user_data("Mappings"),
        DATA,
        "data.train[0] is a mapping with pixels, digit, not (input, target)",
        "choose by name with --data.input=pixels --data.target=digit, or",
    ),
    case(
        "triple for a sample",
        user_data("Triples"),
        DATA,
        "data.train[0] is a tuple of 3, not (input, target)",
    ),
    case(
        "batches that leave out single samples",
        user_data("EvenBatches"),
        DATA,
        "data.train.__getitems__ fails for the index 0, ValueError: an odd number of samples; "
        "let it serve any number of indices",
        "or remove it, so that samples are read one by one.",
    ),
    case(
        "batch that is no pair",
        [*user_data("Zeros"), "--data.collate={class_path: user_code.FirstOnly}"],
        DATA,
        "data.collate is FirstOnly, which gives a tuple of 1 for ",
        "not (inputs, targets); return a pair.",
    ),
    case(
        "function of samples that cannot be called",
        ["--data.collate={class_path: user_code.Plain}"],
        CONFIG,
        "data.collate is a Plain; name a function from a list of samples to a batch",
    ),
    case(
        "column that does not exist",
        [
            "--data.train={class_path: ddp_sgd.data.Columns, init_args: {input: pixel, target: "
            "digit, rows: {class_path: user_code.Mappings}}}"
        ],
        DATA,
        "input names pixel while rows[",
        "] has pixels, digit; name one of those.",
    ),
    case(
        "column that samples lack",
        [*user_data("Mappings"), "--data.input=pixels", "--data.target=[digit, id]"],
        DATA,
        "data.target names id while data.train[0] has pixels, digit; name one of those.",
    ),
    case(
        "target without an input",
        ["--data.target=label"],
        CONFIG,
        "data.target is label while data.input is null; name the part of a sample that the model",
    ),
    case(
        "inputs that are not numbers",
        [*user_data("NotANumber", samples=400), "--log.every_steps=1"],
        DIVERGED,
        "the gradient is not finite for 10 steps in a row at a rate of ",
        "lower optim.lr",
    ),
    case(
        "global batch larger than the data",
        [*user_data("Zeros"), "--data.tail=drop"],
        CONFIG,
        "data.tail is drop while the global batch is 32 of 8 samples",
        "set data.tail=exact, or data.batch_size=8 or less.",
    ),
    case("missing arrays", [ARRAYS], DATA, "x.npz is missing; give the path of a .npz file, or"),
    case(
        "file that is no archive",
        [ARRAYS],
        DATA,
        "x.npz is not a readable .npz file",
        "write it with numpy.savez.",
        files={"x.npz": b"pixels"},
    ),
    case(
        "archive that breaks off",
        [ARRAYS],
        DATA,
        "x.npz is not a readable .npz file",
        files={"x.npz": npz(x_train=ROWS, y_train=LABELS)[:-50]},
    ),
    case(
        "archive with a flipped byte",
        [ARRAYS],
        DATA,
        "x.npz is not a readable .npz file",
        files={"x.npz": npz(x_train=ROWS, y_train=LABELS).replace(b"\0" * 8, b"\0" * 7 + b"x", 20)},
    ),
    case(
        "archive without arrays",
        [ARRAYS],
        DATA,
        "x.npz has no arrays and no x_train; save it with numpy.savez(path, x_train=..., y_train",
        files={"x.npz": npz()},
    ),
    case(
        "archive with other arrays",
        [ARRAYS],
        DATA,
        "x.npz has images and no x_train; save it with",
        files={"x.npz": npz(images=ROWS)},
    ),
    case(
        "pickled arrays",
        [ARRAYS],
        DATA,
        "x.npz is not a readable .npz file",
        "allow_pickle",
        files={"x.npz": npz(x_train=np.array([{}, {}]), y_train=LABELS)},
    ),
    case(
        "arrays of text",
        [ARRAYS],
        DATA,
        "x_train in x.npz is of type <U1",
        "save numbers",
        files={"x.npz": npz(x_train=np.array(["a", "b"]), y_train=LABELS)},
    ),
    case(
        "arrays of different lengths",
        [ARRAYS],
        DATA,
        "the data set has 5 inputs and 4 targets; give each input one target.",
        files={"x.npz": npz(x_train=ROWS, y_train=LABELS[:4])},
    ),
    case(
        "arrays without rows",
        [ARRAYS],
        DATA,
        "data.train is empty",
        files={"x.npz": npz(x_train=ROWS[:0], y_train=LABELS[:0])},
    ),
]

OUTPUTS = [
    case(
        "output below a file",
        ["--output_dir=notes/runs"],
        OUTPUT,
        "notes/runs/digits cannot be written: Not a directory; set output_dir to a folder",
        files={"notes": "a file"},
    ),
    case(
        "output in a file",
        ["--output_dir=notes"],
        OUTPUT,
        "notes/digits cannot be written",
        "set output_dir to a folder that you may write",
        files={"notes": "a file"},
    ),
    case(
        "output that does not fit on the disk's names",
        [f"--output_dir={'x' * 300}"],
        OUTPUT,
        "cannot be written: File name too long; set output_dir",
    ),
]

ENVIRONMENTS = [
    case(
        "rank without world size",
        [],
        CONFIG,
        "WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT are not set, though RANK is; start with",
        "unset RANK WORLD_SIZE LOCAL_RANK to run one process.",
        env={"RANK": "0"},
    ),
    case(
        "world size alone",
        [],
        CONFIG,
        "RANK LOCAL_RANK MASTER_ADDR MASTER_PORT are not set, though WORLD_SIZE is; start with",
        env={"WORLD_SIZE": "2"},
    ),
    case(
        "no port",
        [],
        CONFIG,
        "MASTER_PORT is not set, though RANK WORLD_SIZE LOCAL_RANK is; start with torchrun",
        env=without(TORCHRUN, "MASTER_PORT"),
    ),
    case(
        "rank beyond the world",
        [],
        CONFIG,
        "RANK is '2'; it must be a whole number from 0 to 1",
        env=TORCHRUN | {"RANK": "2"},
    ),
    case(
        "rank that is no number",
        [],
        CONFIG,
        "RANK is 'first'; it must be a whole number from 0 to 1",
        env=TORCHRUN | {"RANK": "first"},
    ),
    case(
        "world without ranks",
        [],
        CONFIG,
        "WORLD_SIZE is '0'; it must be a whole number of at least 1",
        env=TORCHRUN | {"WORLD_SIZE": "0"},
    ),
    case(
        "port that is no number",
        [],
        CONFIG,
        "MASTER_PORT is 'http'; it must be a whole number from 1 to 65535",
        env=TORCHRUN | {"MASTER_PORT": "http"},
    ),
    case(
        "task that is no number",
        [],
        CONFIG,
        "SLURM_PROCID is 'x'; it must be a whole number from 0 to 0",
        env=SRUN | {"SLURM_PROCID": "x", "SLURM_NTASKS": "1"},
    ),
    case(
        "half of SLURM",
        [],
        CONFIG,
        "SLURM_LOCALID is not set, though SLURM_PROCID is; start with srun, or unset SLURM_PROCID",
        env=without(SRUN, "SLURM_LOCALID"),
    ),
    case(
        "SLURM without nodes",
        [],
        CONFIG,
        "SLURM_JOB_NODELIST is not set, though SLURM_NTASKS is above 1; start with srun, or set",
        env=SRUN,
    ),
    case(
        "SLURM without a job",
        [],
        CONFIG,
        "SLURM_JOB_ID is not set, though SLURM_NTASKS is above 1; start with srun, or set MASTER",
        env=SRUN | {"SLURM_JOB_NODELIST": "node[01-02]"},
    ),
    case(
        "nobody listens",
        ["--runtime.timeout_s=2"],
        PEER,
        "rank 1 of 2 could not join at 127.0.0.1:",
        "within 2 s",
        "check that every rank was started",
        env=TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": str(free_port())},
    ),
    case(
        "nobody comes",
        ["--runtime.timeout_s=2"],
        PEER,
        "rank 0 of 2 could not join at 127.0.0.1:",
        "within 2 s",
        env=TORCHRUN | {"MASTER_PORT": str(free_port())},
    ),
    case(
        "host that does not exist",
        ["--runtime.timeout_s=2"],
        PEER,
        "rank 1 of 2 could not join at nowhere.invalid:29400 within 2 s",
        env=TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere.invalid"},
    ),
    case(
        "device that is not there",
        ["--runtime.device=cuda"],
        CONFIG,
        "runtime.device is cuda, but this host has cpu only; set runtime.device=auto.",
        marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator"),
    ),
    case(
        "backend for another device",
        ["--runtime.backend=xccl"],
        CONFIG,
        "runtime.backend is xccl, which needs runtime.device=xpu, while the device is cpu; set",
    ),
]

CASES = [
    *RANGES,
    *COMMAND_LINE,
    *FILES,
    *COMPONENTS,
    *DATA_SETS,
    *OUTPUTS,
    *ENVIRONMENTS,
]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """An empty folder to run in, and an environment that names no launcher."""
    for name in os.environ:
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # other tests are there, too
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DDP_SGD_WANDB__MODE", "disabled")
    monkeypatch.setenv("DDP_SGD_RUNTIME__DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def write_files(files):
    for name, content in files.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def the_line(text):
    """The one line of ours in an output of nothing else."""
    assert text.startswith("ddp_sgd: error: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize(("argv", "code", "words", "files", "env"), CASES)
def test_one_line_and_its_code(argv, code, words, files, env, bench, capsys):
    write_files(files)
    for name, value in env.items():
        bench.setenv(name, value)
    assert main(argv) == code
    out, err = capsys.readouterr()
    line = the_line(err)
    assert [word for word in words if word not in line] == []
    assert "Traceback" not in out
    if Path("runs/digits/result.json").exists():
        result = json.loads(Path("runs/digits/result.json").read_text())
        assert (result["status"], result["exit_code"]) == ("failed", code)
        assert line == f"ddp_sgd: error: {result['error']}\n" or code == INTERNAL


def test_there_are_enough_cases():
    assert len(CASES) >= 100


def test_tensorboard_that_is_not_installed(bench, capsys):
    bench.setitem(sys.modules, "tensorboard", None)  # what find_spec sees of a missing package
    assert main(["--log.tensorboard=true"]) == CONFIG
    line = the_line(capsys.readouterr().err)
    assert "log.tensorboard is true while the package tensorboard is missing; pip install" in line


def test_fault_and_its_traceback_on_request(bench, capsys):
    assert main(["--epochs=0", "--debug"]) == CONFIG
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("ddp_sgd: error: epochs is 0; ")


RANKS = [
    case("unknown key", ["--optim.lrr=1"], CONFIG, "unknown key optim.lrr"),
    case("rank 0 cannot read", user_data("FailsOnRank", rank=0), DATA, "data.train[", "is gone"),
    case("rank 1 cannot read", user_data("FailsOnRank", rank=1), DATA, "data.train[", "is gone"),
    case("labels", ["--model.init_args.classes=7"], DATA, "labels from 0 to 9"),
    case("output", ["--output_dir=f/x"], OUTPUT, "f/x/digits cannot", files={"f": "a file"}),
    case(
        "every rank diverges",
        [*user_data("NotANumber", samples=800), "--log.every_steps=1"],
        DIVERGED,
        "lower optim.lr",
    ),
]


@pytest.mark.parametrize(("argv", "code", "words", "files", "env"), RANKS)
def test_ranks_fail_together_and_one_of_them_tells(argv, code, words, files, env, bench):
    write_files(files)
    port = str(free_port())
    bench.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    ranks = [
        commands.Popen(
            [sys.executable, "-m", "ddp_sgd.train", *argv],
            env=os.environ | TORCHRUN | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [rank.communicate(timeout=WAIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [code, code], said
    (line,) = (line for line in "".join(said).splitlines() if "ddp_sgd: error: " in line)
    assert [word for word in words if word not in line] == []
    assert "Traceback" not in "".join(said)


def test_under_torchrun_one_rank_tells(bench):
    bench.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    options = user_data("RaisesAt", at=5, samples=64)
    done = commands.run(
        [*torchrun, "-m", "ddp_sgd.train", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if "ddp_sgd: error: " in line)
    assert "data.train[5] cannot be read" in line
    assert json.loads(Path("runs/digits/result.json").read_text())["exit_code"] == DATA
