"""What happens often is said seldom, and nothing of it is lost from the counts."""

from __future__ import annotations

from psq.seldom import Due, Seldom


def test_the_first_is_said_at_once_and_the_next_when_its_time_has_come_with_all_between():
    seldom = Seldom(10.0)
    said = {at: seldom.note("rank 3", at) for at in (0.0, 4.0, 9.9, 10.0, 11.0, 25.0)}
    assert said == {
        0.0: Due(1, 1),
        4.0: None,
        9.9: None,
        10.0: Due(4, 3),
        11.0: None,
        25.0: Due(6, 2),
    }


def test_each_key_is_said_and_counted_for_itself():
    seldom = Seldom(10.0)
    assert [seldom.note(key, 1.0) for key in "aab"] == [Due(1, 1), None, Due(1, 1)]
