"""Random numbers of transforms, against plain Python and against chance."""

import pytest
import torch

from ddp_sgd.data.augment import Transforms
from ddp_sgd.data.draws import Draws, mix, sample_keys
from ddp_sgd.seeds import seed_for

WORD = 2**64 - 1
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ONES = -1  # as int64
SAMPLES = 20_000


def plain_mix(number):
    number &= WORD
    number = (number ^ number >> 30) * FIRST & WORD
    number = (number ^ number >> 27) * SECOND & WORD
    return number ^ number >> 31


def plain_unmix(number):
    for shift, factor in ((31, SECOND), (27, FIRST), (30, 1)):
        undone = number
        for _ in range(64 // shift):
            undone = number ^ undone >> shift
        number = undone * pow(factor, -1, 2**64) & WORD
    return number


def plain_bits(seed, epoch, index, name, occurrence, number):
    """Give number ``number`` of a transform for a sample, in [0, 2^64)."""
    epoch_key = plain_mix(seed_for("draws", seed) + epoch * GAMMA)
    key = plain_mix(epoch_key + index * GAMMA)
    stream = seed_for(f"transform {name}", seed, occurrence)
    return plain_mix((key ^ stream) + number * GAMMA)


def signed(number):
    return (number & WORD) - 2**64 if number >> 63 & 1 else number & WORD


def drawing(bits):
    """Draws whose first 64 bits are given."""
    return Draws(torch.tensor([signed(plain_unmix(bits & WORD) - GAMMA)]))


class Recorder:
    """Keeps what it draws."""

    def __init__(self, draw):
        self.draw, self.drawn = draw, []

    def __call__(self, batch, draws):
        self.drawn.append(self.draw(draws))
        return batch


class Another(Recorder):
    pass


def numbers(seed=1, epoch=0, count=1, kind=Recorder, before=(), samples=SAMPLES):
    """Give what a transform draws for the first samples: float64 of shape (samples, count)."""
    recorder = kind(lambda draws: draws.uniform(count))
    indices = torch.arange(samples)
    Transforms([*before, recorder], seed=seed)(indices, indices, epoch)
    return recorder.drawn[0].double()


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


def test_hash_is_the_generator_that_it_is_named_after():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = torch.tensor([signed(1234567 + number * GAMMA) for number in (1, 2, 3, 4)])
    assert [number & WORD for number in mix(states).tolist()] == known


def test_hash_equals_plain_python_at_the_ends_of_the_range():
    ends = [0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]
    mixed = mix(torch.tensor([signed(end) for end in ends])).tolist()
    assert [number & WORD for number in mixed] == [plain_mix(end) for end in ends]
    assert [plain_unmix(plain_mix(end)) for end in ends] == ends


def test_hash_leaves_its_argument_alone():
    numbers = torch.arange(5)
    mix(numbers)
    assert numbers.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("epoch", [0, 1, 7, 10**6, -1])
def test_bits_equal_plain_python(epoch):
    indices = [0, 1, 2**31, 2**40, 2**62]
    recorder, again = (Recorder(lambda draws: draws.bits(2)) for _ in range(2))
    transforms = Transforms([recorder, again], seed=5)
    transforms(torch.zeros(5), torch.tensor(indices), epoch)
    for occurrence, each in enumerate((recorder, again)):
        assert [[number & WORD for number in row] for row in each.drawn[0].tolist()] == [
            [plain_bits(5, epoch, index, "Recorder", occurrence, number) for number in (1, 2)]
            for index in indices
        ]


def test_an_epoch_may_be_a_tensor():
    indices = torch.arange(9)
    for epoch in (0, 3, -1):
        keys = sample_keys(7, epoch, indices)
        assert torch.equal(sample_keys(7, torch.tensor(epoch), indices), keys)


def test_calls_go_on_where_the_last_one_ended():
    keys = torch.arange(5)
    draws = Draws(keys)
    parts = [draws.bits(), draws.bits(2), draws.bits(3)]
    assert torch.equal(torch.cat(parts, dim=1), Draws(keys).bits(6))
    assert draws.samples == 5


def test_uniform_numbers_end_below_one():
    assert drawing(ONES).bits().item() == ONES
    assert drawing(ONES).uniform().item() == 1 - 2**-24
    assert drawing(0).uniform().item() == 0
    assert drawing(2**63).uniform().item() == 0.5
    assert drawing(2**40 - 1).uniform().item() == 0
    drawn = numbers(count=50)
    assert drawn.min() >= 0
    assert drawn.max() < 1


def test_uniform_numbers_are_the_upper_bits():
    draws, again = Draws(torch.arange(100)), Draws(torch.arange(100))
    expected = [[(number & WORD) >> 40 for number in row] for row in draws.bits(3).tolist()]
    assert (again.uniform(3).double() * 2**24).tolist() == expected
    assert again.uniform().dtype == torch.float32


@pytest.mark.parametrize(("low", "high"), [(0, 9), (-4, 5), (3, 4), (0, 2**31), (-(2**31), 0)])
def test_integers_end_where_they_are_told_to(low, high):
    assert drawing(0).integers(low, high).item() == low
    assert drawing(ONES).integers(low, high).item() == high - 1
    drawn = Draws(torch.arange(1000)).integers(low, high, 3)
    assert drawn.shape == (1000, 3)
    assert drawn.dtype == torch.int64
    expected = [
        [((number & WORD) >> 32) * (high - low) // 2**32 + low for number in row]
        for row in Draws(torch.arange(1000)).bits(3).tolist()
    ]
    assert drawn.tolist() == expected


@pytest.mark.parametrize(("low", "high"), [(0, 0), (5, 3), (0, 2**31 + 1)])
def test_a_range_without_numbers_is_refused(low, high):
    with pytest.raises(ValueError, match=f"the range from {low} up to {high} has no number"):
        Draws(torch.arange(1)).integers(low, high)


def test_uniform_numbers_are_uniform():
    drawn = numbers(count=10)
    counts = torch.histc(drawn, bins=256, min=0, max=1)
    assert chi_square(counts) < 341  # 255 degrees of freedom: 1 in 4,000
    assert drawn.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / drawn.numel()) ** 0.5)


def test_integers_are_uniform():
    drawn = Draws(torch.arange(SAMPLES)).integers(0, 81)
    assert chi_square(torch.bincount(drawn.flatten(), minlength=81).double()) < 133  # 1 in 5,000


def test_every_bit_is_set_half_of_the_time():
    bits = Draws(torch.arange(SAMPLES)).bits()
    for place in range(64):
        share = (bits >> place & 1).double().mean().item()
        assert abs(share - 0.5) < 4.5 * 0.5 / SAMPLES**0.5, place


@pytest.mark.parametrize("what", ["index", "epoch", "seed"])
def test_any_bit_that_changes_turns_half_of_the_others(what):
    before = plain_bits(1, 3, 12_345, "RandomCrop", 0, 1)
    turned = []
    for place in range(31):
        at = {"seed": 1, "epoch": 3, "index": 12_345}
        at[what] ^= 1 << place
        turned.append(before ^ plain_bits(**at, name="RandomCrop", occurrence=0, number=1))
    counts = [change.bit_count() for change in turned]
    assert min(counts) > 12
    assert sum(counts) / len(counts) == pytest.approx(32, abs=4 * (16 / 31) ** 0.5)


def shifted(drawn):
    return drawn[1:], drawn[:-1]


def pairs():
    two = numbers(count=2)
    yield "successive indices", *shifted(numbers())
    yield "every 64th index", numbers()[64:], numbers()[:-64]
    yield "numbers of one sample", two[:, :1], two[:, 1:]
    yield "the next sample's first and this one's second", two[1:, :1], two[:-1, 1:]
    yield "successive epochs", numbers(), numbers(epoch=1)
    yield "epoch and index", numbers(epoch=1)[:-1], numbers(epoch=0)[1:]
    yield "training and evaluation", numbers(), numbers(epoch=-1)
    yield "successive seeds", numbers(), numbers(seed=2)
    yield "classes", numbers(), numbers(kind=Another)
    yield "occurrences", numbers(), numbers(before=[Recorder(Draws.uniform)])


@pytest.mark.parametrize(("what", "one", "other"), [pytest.param(*p, id=p[0]) for p in pairs()])
def test_numbers_of_different_places_are_independent(what, one, other):
    assert len(one) == len(other)
    correlation = torch.corrcoef(torch.cat([one, other], dim=1).T)[0, 1].item()
    assert abs(correlation) < 4 / len(one) ** 0.5
    cells = (one * 8).long() * 8 + (other * 8).long()  # also of other forms than a line
    assert chi_square(torch.bincount(cells.flatten(), minlength=64).double()) < 111  # 1 in 6,000


def test_another_transform_in_the_list_changes_no_numbers():
    assert torch.equal(numbers(before=[Another(Draws.uniform)]), numbers())
    assert not torch.equal(numbers(before=[Recorder(Draws.uniform)]), numbers())


def test_what_a_batch_holds_besides_changes_no_numbers():
    whole = numbers(samples=100, count=3)
    for indices in ([5], [99, 0, 5], [17] * 4):
        recorder = Recorder(lambda draws: draws.uniform(3))
        Transforms([recorder], seed=1)(torch.zeros(len(indices)), torch.tensor(indices), 0)
        assert torch.equal(recorder.drawn[0].double(), whole[indices])
