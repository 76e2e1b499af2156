import pytest

from psq.layout import cut
from psq.rules.base import ChoiceRule
from psq.rules.choices import First, Periodic

LAYOUT = cut([("a", (64,))], [lambda n: 4 * n])


def never():
    pytest.fail("the norm was asked for")


def rounds_of(choice, last):
    chosen = {t: choice.choose(0, t, never) for t in range(1, last + 1)}
    assert set(chosen.values()) <= {0, 1}
    return [t for t, index in chosen.items() if index == 1]


def test_first_marks_the_first_rounds():
    choice = First({"steps": 3}, codecs=("sign", "fp32"), layout=LAYOUT)
    assert rounds_of(choice, 9) == [1, 2, 3]


def test_periodic_marks_the_first_rounds_and_then_multiples():
    choice = Periodic({"first": 3, "period": 4}, codecs=("sign", "fp32"), layout=LAYOUT)
    assert rounds_of(choice, 13) == [1, 2, 3, 4, 8, 12]


def test_a_fixed_choice_is_always_the_default():
    assert rounds_of(ChoiceRule({}, codecs=("sign",), layout=LAYOUT), 9) == []
