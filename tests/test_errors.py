import pickle

import pytest

from ddp_sgd import errors
from ddp_sgd.errors import ExitCode, RemoteError, UserError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError, 64),
        (errors.DataError, 65),
        (errors.PeerError, 69),
        (errors.UserError, 70),
        (errors.OutputError, 73),
        (errors.DivergedError, 76),
    ],
)
def test_code_of_an_error_is_the_contract(error, code):
    assert error("optim.lr is 0; choose a rate.").exit_code == code
    assert issubclass(error, UserError)


def test_codes_that_are_no_error():
    assert (ExitCode.DONE, ExitCode.STOPPED, ExitCode.REFUSED) == (0, 75, 77)


def test_message_is_one_line():
    assert str(errors.DataError("x.npz is  broken:\n  line 2\r\n\tof 3; fix it. ")) == (
        "x.npz is broken: line 2 of 3; fix it."
    )


def test_fault_elsewhere_takes_over_the_code_of_the_other_rank():
    error = RemoteError("data.train is empty; name another.", 65)
    assert error.exit_code is ExitCode.DATA
    assert str(error) == "data.train is empty; name another."
    assert RemoteError.exit_code is ExitCode.INTERNAL


def test_code_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="42"):
        RemoteError("x", 42)


@pytest.mark.parametrize("error", [errors.ConfigError("x is 1; y."), errors.OutputError("z")])
def test_errors_travel_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.exit_code) == (type(error), str(error), error.exit_code)
