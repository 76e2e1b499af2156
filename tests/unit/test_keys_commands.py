"""psq keygen and psq keys: what is made, for whom, and what is never undone by accident."""

import json
import stat

import pytest

from psq.config.options import run
from psq.errors import ConfigError
from psq.keys import Ranks, load_server_keys, load_worker_keys, read_authorized, read_secret
from psq_worker.cli import psq
from psq_worker.keys import add_workers, list_keys, make_keys, revoke


@pytest.fixture
def call(capsys):
    """Run psq in this process: (exit code, stdout, stderr)."""

    def calling(*words):
        with pytest.raises(SystemExit) as ended:
            run(psq, "psq", [str(word) for word in words])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return calling


@pytest.fixture
def root(tmp_path):
    return tmp_path / "keys"


def names(folder):
    return [one.name for one in list_keys(folder)[0]]


def test_every_rank_gets_a_key_that_the_server_takes_for_this_rank_alone(call, root):
    code, out, _ = call("keygen", "-n", 3, "-o", root)
    assert (code, out.split()) == (0, [str(root / name) for name in
                                       ("server", "rank0", "rank1", "rank2")])  # fmt: skip
    server = load_server_keys(root)
    inside, _ = read_authorized(server.authorized)
    for rank in range(3):
        mine = load_worker_keys(root, Ranks(rank, rank))
        assert mine.server == server.own.public
        assert inside[mine.own.public].ranks == Ranks(rank, rank)
    assert len({key.secret for key in [server.own, *(load_worker_keys(root, Ranks(r, r)).own
                                                     for r in range(3))]}) == 4  # fmt: skip


def test_secrets_and_folders_are_their_owners_alone(root):
    make_keys(root, 2, [Ranks(0, 1)])
    for path in [root, *root.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        expected = 0o700 if path.is_dir() else 0o600 if path.suffix == ".secret" else 0o644
        assert mode == expected, path


def test_no_secret_is_printed(call, root):
    said = [call("keygen", "-n", 2, "-o", root), call("keys", "list", root)]
    said += [call("keys", "add", root, 5), call("keys", "revoke", root, "rank5")]
    assert [code for code, _, _ in said] == [0, 0, 0, 0]
    printed = "".join(out + err for _, out, err in said)
    for path in root.rglob("*.secret"):
        assert read_secret(path).secret not in printed


def test_keys_are_never_overwritten(call, root):
    make_keys(root, 2)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    code, _, err = call("keygen", "-n", 3, "-o", root)
    assert code == 78
    assert "server.secret is there already" in err
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_keys_that_are_all_there_can_be_kept(call, root):
    assert call("keygen", "-n", 2, "-o", root, "--keep")[0] == 0
    before = read_secret(root / "server" / "server.secret")
    assert call("keygen", "-n", 2, "-o", root, "--keep")[0] == 0
    assert read_secret(root / "server" / "server.secret") == before
    assert call("keygen", "-n", 3, "-o", root, "--keep")[0] == 78  # one is missing


def test_a_tree_has_a_pair_for_each_conversation(root):
    make_keys(root, 5, [Ranks(0, 3), Ranks(0, 1), Ranks(2, 3)])
    assert names(root) == ["aggregator0-3", "rank4"]
    assert names(root / "aggregator0-3") == ["aggregator0-1", "aggregator2-3"]
    assert names(root / "aggregator2-3") == ["rank2", "rank3"]
    above = load_worker_keys(root, Ranks(0, 3), "aggregator0-3")
    assert above.server == load_server_keys(root).own.public
    below = load_worker_keys(root, Ranks(3, 3))
    assert below.server == load_server_keys(root, "aggregator2-3").own.public


@pytest.mark.parametrize("listed", ["0-5", "1", "3-1", "0-2,1-3", "0-1,0-1"])
def test_aggregators_that_make_no_tree_are_refused(call, root, listed):
    code, _, err = call("keygen", "-n", 4, "-o", root, "--aggregators", listed)
    assert code == 78
    assert "aggregators: " in err or "ranks: " in err
    assert not root.exists()


def test_a_rank_can_be_added_and_revoked(call, root):
    make_keys(root, 1)
    assert call("keys", "add", root, 3)[0] == 0
    assert names(root) == ["rank0", "rank3"]
    code, _, err = call("keys", "revoke", root, "rank0")
    assert (code, names(root)) == (0, ["rank3"])
    assert "revoked: rank0; a server that runs notices within 1 s" in err
    assert (root / "server" / "revoked_workers" / "rank0.pub").exists()


def test_an_added_rank_belongs_to_its_aggregator(root):
    make_keys(root, 4, [Ranks(0, 3)])
    revoke(root / "aggregator0-3", ["rank2"])
    (root / "rank2").rename(root / "lost")
    add_workers(root, [2])
    assert names(root / "aggregator0-3") == ["rank0", "rank1", "rank2", "rank3"]


def test_revoking_a_key_that_is_not_there_changes_nothing_and_lists_those_that_are(root):
    make_keys(root, 2)
    with pytest.raises(ConfigError, match="no key 'rank7'; there are: rank0, rank1"):
        revoke(root, ["rank0", "rank7"])
    assert names(root) == ["rank0", "rank1"]


def test_a_list_for_programs_has_names_ranks_and_fingerprints(call, root):
    make_keys(root, 2)
    (root / "server" / "authorized_workers" / "broken.pub").write_text("?")
    code, out, _ = call("keys", "list", root, "--json")
    said = json.loads(out)
    assert code == 0
    assert [(one["name"], one["ranks"]) for one in said["keys"]] == [("rank0", "0"), ("rank1", "1")]
    assert len(said["faults"]) == 1


def test_a_folder_without_a_list_is_refused_by_name(call, tmp_path):
    code, _, err = call("keys", "list", tmp_path)
    assert code == 78
    assert f"neither {tmp_path} nor {tmp_path}/server has a folder authorized_workers" in err
