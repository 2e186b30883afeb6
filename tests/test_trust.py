import subprocess
import sys

import pytest

from ddp_sgd.errors import RefusedError
from ddp_sgd.instantiate import is_trusted, refuse_untrusted

TRUSTED = [
    "ddp_sgd.data.Digits",
    "ddp_sgd.data.augment.RandomCrop",
    "ddp_sgd.models.MLP",
    "torch.nn.Linear",
    "torch.nn.modules.linear.Linear",
    "torch.nn.functional.cross_entropy",
    "torch.tensor",
    "torch.utils.data.TensorDataset",
    "torch.utils.data.default_collate",
    "torchvision.models.resnet18",
    "torchvision.datasets.FakeData",
    "torchvision.transforms.ToTensor",
    "torchvision.transforms.v2.RandomCrop",
    "torchvision.transforms.InterpolationMode.BILINEAR",
    "timm.create_model",
    "timm.models.resnet.ResNet",
    "timm.loss.LabelSmoothingCrossEntropy",
]
FOREIGN = [
    "user_code.Zeros",
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "numpy.load",
    "torchx.nn.Linear",
    "torchvision_extra.models.Net",
    "torch.hub.load",
    "torch.load",
    "torch.utils.cpp_extension.load",
    "torch.compile",
    "torch.os.system",
    "torch.nn.functional.importlib.import_module",
    "torch.nn.functional.warnings.warn",
    "torch.nn.functional.warnings",
    "torch.nn.functional",
    "torch.nn.modules.module.functools.partial",
    "torch.utils.data.dataloader.os.system",
    "torch.utils.data.dataloader.threading.Thread",
    "torch.nn.Module.__init_subclass__.__self__",
    "torch.nn.init.constant_",
    "torchvision.datasets.utils.download_url",
    "torchvision.datasets.folder.default_loader",
    "torchvision.datasets.mnist.os.system",
    "timm.models.load_checkpoint",
    "ddp_sgd.instantiate.instantiate",
    "ddp_sgd.data.workers.os.system",
    "ddp_sgd.data.augment.refuse_out_of_memory",
]


@pytest.mark.parametrize("path", TRUSTED)
def test_what_these_packages_define_may_be_named(path):
    assert is_trusted(path)


@pytest.mark.parametrize("path", FOREIGN)
def test_what_runs_other_code_may_not(path):
    assert not is_trusted(path)


def test_a_name_that_is_nowhere_is_left_to_whoever_builds_it():
    assert is_trusted("torch.nn.Liner")
    assert is_trusted("torch.nn.nowhere.Linear")


def test_nothing_foreign_is_imported():
    code = (
        "import sys; from ddp_sgd.instantiate import is_trusted; "
        "is_trusted('user_code.Zeros'), is_trusted('antigravity.fly'); "
        "sys.exit(any(name in sys.modules for name in ('user_code', 'antigravity', 'torch')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


NESTED = {
    "model": {
        "class_path": "torch.nn.Sequential",
        "args": [{"class_path": "mine.Layer"}, {"class_path": "torch.nn.ReLU"}],
    },
    "loss": {
        "class_path": "torch.nn.CrossEntropyLoss",
        "init_args": {"weight": {"deep": [{"class_path": "os.system", "args": ["true"]}]}},
    },
}


def test_all_that_is_foreign_is_listed_at_any_depth():
    with pytest.raises(RefusedError) as caught:
        refuse_untrusted(NESTED, {}, "runs/x/checkpoints/best")
    assert str(caught.value) == (
        "runs/x/checkpoints/best names mine.Layer, os.system, whose code would run; give --trust "
        "if you trust the file, or name them yourself by --config or by options such as "
        "--model.class_path."
    )
    assert caught.value.exit_code == 77


def test_what_the_caller_has_named_is_built():
    given = {"model": {"args": [{"class_path": "mine.Layer"}]}}
    with pytest.raises(RefusedError, match="names os.system, whose code"):
        refuse_untrusted(NESTED, given, "x")
    given["loss"] = {"class_path": "os.system"}
    refuse_untrusted(NESTED, given, "x")
