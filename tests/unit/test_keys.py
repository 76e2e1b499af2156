"""Key files: who may read them, who is let in, and what is never shown."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq import keys
from psq.errors import ConfigError
from psq.keys import (
    AUTHORIZED,
    Authorized,
    Ranks,
    SecretKey,
    fingerprint,
    load_server_keys,
    load_worker_keys,
    parse_ranks,
    read_authorized,
    read_public,
    read_secret,
    write_public,
    write_secret,
)

PAIR = SecretKey("p" * 40, "s3cr3t<>{}" * 4, Ranks(3, 3))
OTHER = "q" * 40


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "worker.secret"
    write_secret(path, PAIR, "rank 3")
    return path


@pytest.fixture
def server(tmp_path):
    """A server's folder that lets in rank 3."""
    folder = tmp_path / "server"
    (folder / AUTHORIZED).mkdir(parents=True, mode=0o700)
    write_secret(folder / "server.secret", SecretKey(OTHER, "t" * 40), "the server")
    write_public(folder / AUTHORIZED / "rank3.pub", PAIR.public, "rank 3", Ranks(3, 3))
    return folder


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_secret_is_its_owners_alone_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_secret(tmp_path / "a.secret", PAIR, "rank 3")
        write_public(tmp_path / "a.pub", PAIR.public, "rank 3", PAIR.ranks)
    finally:
        os.umask(before)
    assert (mode_of(tmp_path / "a.secret"), mode_of(tmp_path / "a.pub")) == (0o600, 0o644)


def test_what_was_written_is_read(secret, tmp_path):
    assert read_secret(secret) == PAIR
    write_public(tmp_path / "rank3.pub", PAIR.public, "rank 3", PAIR.ranks)
    assert read_public(tmp_path / "rank3.pub") == ("rank3", PAIR.public, PAIR.ranks)


def test_a_key_is_never_overwritten(secret):
    with pytest.raises(ConfigError, match=r"worker\.secret is there already.*never overwritten"):
        write_secret(secret, PAIR, "rank 3")
    assert read_secret(secret) == PAIR


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o777])
def test_a_secret_that_others_may_use_is_refused(secret, mode):
    secret.chmod(mode)
    with pytest.raises(ConfigError, match=rf"\(mode {mode:04o}\): chmod 600 {secret}"):
        read_secret(secret)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_secret_of_another_user_is_refused(secret):
    os.chown(secret, 4242, -1)
    with pytest.raises(ConfigError, match=r"belongs to another user \(uid 4242\)"):
        read_secret(secret)


def test_a_secret_is_in_no_text_of_the_objects_that_hold_it(secret, server, tmp_path):
    write_public(tmp_path / "server.pub", OTHER, "the server")
    objects = [read_secret(secret), load_server_keys(server), load_worker_keys(tmp_path)]
    for each in objects:
        for text in (repr(each), str(each)):
            assert PAIR.secret not in text
            assert "t" * 40 not in text


@given(garbage=st.binary(max_size=300))
def test_a_file_that_is_no_key_is_refused_without_being_quoted(tmp_path_factory, garbage):
    path = tmp_path_factory.mktemp("keys") / "a.secret"
    path.write_bytes(b"tellnobody = " + garbage)
    path.chmod(0o600)
    with pytest.raises(ConfigError) as refused:
        read_secret(path)
    assert "tellnobody" not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('public = "short"', "'public' is no key"),
        ("public = 7", "'public' is no key"),
        ("", "'public' is no key"),
        (f'public = "{OTHER[:-1]} "', "'public' is no key"),
        (f'public = "{OTHER}"\nranks = "4-2"', "ranks: expected a rank such as 3"),
        (f'public = "{OTHER}"\nranks = "x"', "ranks: expected a rank such as 3"),
        ("#" * 5000, "at most 4096 bytes"),
    ],
)
def test_a_public_key_file_says_what_is_wrong_with_it(tmp_path, text, words):
    path = tmp_path / "rank0.pub"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_public(path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rank0.pub")
    with pytest.raises(ConfigError, match="is no file"):
        read_public(tmp_path / "rank0.pub")


@pytest.mark.parametrize(("text", "ranks"), [("0", Ranks(0, 0)), ("0-3", Ranks(0, 3))])
def test_ranks_are_written_as_they_are_read(text, ranks):
    assert parse_ranks(text) == ranks
    assert ranks.text == text


@pytest.mark.parametrize("text", ["", "-1", "3-", "1-0", "a", "1,2", "12345", "٣", "1 "])
def test_what_names_no_ranks_is_refused(text):
    with pytest.raises(ConfigError, match="ranks: expected"):
        parse_ranks(text)


@given(a=st.integers(0, 50), b=st.integers(0, 50), rank=st.integers(0, 50))
def test_ranks_cover_exactly_what_lies_between_them(a, b, rank):
    ranks = Ranks(min(a, b), max(a, b))
    assert ranks.covers(rank, rank) == (rank in range(ranks.first, ranks.last + 1))
    assert ranks.covers(ranks.first, ranks.last)
    assert not ranks.covers(ranks.first, ranks.last + 1)


def test_a_server_lets_in_whom_its_folder_lists(server):
    found, faults = read_authorized(load_server_keys(server).authorized)
    assert found == {PAIR.public: Authorized("rank3", PAIR.public, Ranks(3, 3))}
    assert faults == []


def test_a_file_that_is_wrong_lets_nobody_in_and_keeps_nobody_out(server):
    inside = server / AUTHORIZED
    (inside / "broken.pub").write_text("nonsense")
    (inside / "noranks.pub").write_text(f'public = "{OTHER}"')
    (inside / "zdouble.pub").write_text(f'public = "{PAIR.public}"\nranks = "7"')
    (inside / "README").write_text("no key")
    found, faults = read_authorized(inside)
    assert [one.name for one in found.values()] == ["rank3"]
    assert [words for fault in faults for words in ("no key file", "says no ranks", "the same key")
            if words in fault] == ["no key file", "says no ranks", "the same key"]  # fmt: skip
    with pytest.raises(ConfigError, match="no key file"):
        load_server_keys(server)  # at the start somebody is there to read it


def test_more_keys_than_the_limit_are_refused(server, monkeypatch):
    monkeypatch.setattr(keys, "MAX_AUTHORIZED", 0)
    with pytest.raises(ConfigError, match="1 keys, at most 0 are read"):
        read_authorized(server / AUTHORIZED)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_a_list_that_others_may_change_is_refused(server, mode):
    (server / AUTHORIZED).chmod(mode)
    with pytest.raises(ConfigError, match=r"others may change it .*: chmod 700"):
        load_server_keys(server)


def test_keys_are_found_in_their_folder_and_in_the_one_of_all(server, tmp_path):
    assert load_server_keys(server) == load_server_keys(tmp_path)
    folder = tmp_path / "rank3"
    folder.mkdir()
    write_secret(folder / "worker.secret", PAIR, "rank 3")
    write_public(folder / "server.pub", OTHER, "the server")
    mine = load_worker_keys(tmp_path, Ranks(3, 3))
    assert mine == load_worker_keys(folder, Ranks(3, 3))
    assert (mine.server, mine.rank) == (OTHER, 3)


def test_where_no_keys_are_it_is_said_where_they_were_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"rank2 has a file worker\.secret.*psq keygen"):
        load_worker_keys(tmp_path, Ranks(2, 2))
    with pytest.raises(ConfigError, match=r"server has a file server\.secret.*psq keygen"):
        load_server_keys(tmp_path)


def test_the_key_of_another_rank_is_refused_before_anybody_is_asked(secret, tmp_path):
    write_public(tmp_path / "server.pub", OTHER, "the server")
    with pytest.raises(ConfigError, match=r"is the key of rank 3, and this process .* rank 4"):
        load_worker_keys(tmp_path, Ranks(4, 4))
    assert secret.exists()


def test_a_fingerprint_is_short_and_says_nothing_of_the_key():
    assert fingerprint(OTHER) == fingerprint(OTHER)
    assert len(fingerprint(OTHER)) == 16
    assert fingerprint(OTHER) != fingerprint(PAIR.public)
