"""What a worker believes of a server that comes back."""

import pytest

from psq.client.epochs import Epochs
from psq.errors import RemoteProtocolError


def test_the_first_epoch_is_not_a_new_one():
    assert not Epochs().enter(3, 10)


def test_joining_again_in_the_same_epoch_changes_nothing():
    epochs = Epochs()
    epochs.enter(3, 10)
    assert not epochs.enter(3, 11)


def test_a_later_epoch_is_new_once():
    epochs = Epochs()
    epochs.enter(3, 10)
    assert epochs.enter(4, 10)
    assert not epochs.enter(4, 10)


def test_a_server_behind_what_it_had_committed_is_a_rollback_and_both_rounds_are_named():
    epochs = Epochs()
    epochs.enter(3, 10)
    epochs.heard(12)
    with pytest.raises(RemoteProtocolError, match=r"^ROLLBACK: .* round 11, .* of round 12"):
        epochs.enter(4, 11)


def test_a_server_that_was_set_back_and_is_further_by_now_is_a_rollback():
    epochs = Epochs()
    epochs.enter(3, 10)
    epochs.heard(12)
    words = r"^ROLLBACK: .* round 15 \(made anew from round 11 on\), .* round 12"
    with pytest.raises(RemoteProtocolError, match=words):
        epochs.enter(5, 15, 11)


def test_of_a_server_that_was_set_back_is_sure_what_it_did_not_make_anew():
    epochs = Epochs()
    epochs.enter(3, 10)
    assert epochs.enter(4, 15, 12)
    assert epochs.sure == 12


def test_a_process_that_has_nothing_follows_a_server_that_went_back():
    epochs = Epochs()
    epochs.enter(3, 10)
    assert epochs.enter(4, 2, has_nothing=True)
    with pytest.raises(RemoteProtocolError, match=r"^ROLLBACK"):
        epochs.enter(5, 1)


def test_what_was_heard_late_takes_nothing_back():
    epochs = Epochs()
    epochs.heard(12)
    epochs.heard(7)
    assert not epochs.enter(1, 12)


def test_a_process_that_takes_up_an_identity_may_have_heard_more_than_its_welcome_said():
    epochs = Epochs()
    epochs.heard(5)  # by STATUS, while another server had not welcomed it yet
    epochs.begin(2, 4)
    assert not epochs.enter(2, 5)


def test_where_shards_come_early_a_new_epoch_is_sure_of_what_was_committed_only():
    for early, sure in ((True, 10), (False, 12)):
        epochs = Epochs(early=early)
        epochs.enter(3, 10)
        epochs.enter(4, 12)
        assert epochs.sure == sure
