from ddp_sgd.engine.train_state import State


def test_a_run_starts_at_step_0_unscored():
    assert (State().step, State().scores) == (0, {})
    assert State().scores is not State().scores
