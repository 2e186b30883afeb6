import pytest

from ddp_sgd.host import count_gpus

LISTS_TWO = 'echo "GPU 0: x (UUID: y)"; echo "GPU 1: x (UUID: z)"'


def write_tool(folder, name, text=""):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,2,5"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "MIG-0a,GPU-1b"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"HIP_VISIBLE_DEVICES": "0,2,5"}, 3),
        ({"ROCR_VISIBLE_DEVICES": "GPU-1b,GPU-2c,3,4"}, 4),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3", "HIP_VISIBLE_DEVICES": "0,1,3"}, 3),
        ({"ROCR_VISIBLE_DEVICES": ""}, 0),
        ({"ZE_AFFINITY_MASK": "0.0,0.1,1.0"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "3", "ROCR_VISIBLE_DEVICES": "0,1,2,3"}, 1),  # SLURM sets both
    ],
)
def test_variables_that_narrow_the_gpus_count_first(variables, gpus, tmp_path):
    write_tool(tmp_path, "nvidia-smi", LISTS_TWO)
    assert count_gpus({"PATH": str(tmp_path)} | variables) == gpus


def test_gpus_that_the_driver_lists(tmp_path):
    write_tool(tmp_path, "nvidia-smi", LISTS_TWO)
    assert count_gpus({"PATH": str(tmp_path)}) == 2


@pytest.mark.parametrize(("found", "gpus"), [("4", 4), ("0", 0), ("'no GPU'", 0)])
def test_torch_counts_where_there_is_a_tool_of_others(found, gpus, tmp_path):
    """A driver of NVIDIA that is missing, or has no GPU, says nothing about those of others."""
    write_tool(tmp_path, "nvidia-smi", "echo 'No devices were found'; exit 6")
    write_tool(tmp_path, "rocm-smi")
    (tmp_path / "torch.py").write_text(f"class accelerator:\n    device_count = lambda: {found}\n")
    assert count_gpus({"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}) == gpus
