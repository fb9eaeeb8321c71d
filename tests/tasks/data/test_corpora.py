"""Corpora: published counts, tokenizers, splits, the cache, downloads, and every refusal."""

import functools
import hashlib
import http.server
import itertools
import os
import random
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from lmnas.core import places
from lmnas.core.errors import UserError
from lmnas.tasks.data import corpora, download
from lmnas.tasks.data.corpora import Corpus, open_corpus

LETTERS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
HERE = places.data()
needs_ptb = pytest.mark.skipif(
    not any((HERE / folder).is_dir() for folder in download.PUBLISHED["ptb"]),
    reason="Penn Treebank is not in the folder that LMNAS_DATA names",
)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No test reads or writes the user's caches."""
    monkeypatch.setenv("LMNAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LMNAS_DATA", str(tmp_path / "data"))


def lines_of_text(n_lines: int = 100) -> str:
    return "".join(f"{LETTERS[i % 8]} {LETTERS[i * 3 % 8]} it's {i % 4}.\n" for i in range(n_lines))


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def folder_of(path: Path, train: str, valid: str, test: str, names=("train.txt", "valid.txt", "test.txt")) -> str:
    for name, text in zip(names, (train, valid, test), strict=True):
        write(path / name, text)
    return str(path)


def words(corpus: Corpus, split: str) -> list[str]:
    return [corpus.vocabulary[number] for number in corpus.splits[split].tolist()]


def same(first: Corpus, second: Corpus) -> bool:
    return first.vocabulary == second.vocabulary and all(
        torch.equal(first.splits[split], second.splits[split]) for split in ("train", "valid", "test")
    )


# ------------------------------------------------------------------------------------------------- known corpora


@needs_ptb
def test_ptb_has_its_published_counts(monkeypatch):
    monkeypatch.setenv("LMNAS_DATA", str(HERE))
    corpus = open_corpus("ptb")
    info = corpus.info()
    assert info["tokens"] == {"train": 929_589, "valid": 73_760, "test": 82_430}
    assert info["vocabulary"] == 10_000
    assert words(corpus, "train")[:3] == ["aer", "banknote", "berlitz"]
    assert corpus.vocabulary[:3] == ["the", "<unk>", "<eos>"]


@needs_ptb
def test_ptb_by_characters_counts_every_byte(monkeypatch):
    monkeypatch.setenv("LMNAS_DATA", str(HERE))
    # Plain ASCII with \n line ends, so a token is a byte; the classic 50 characters.
    info = open_corpus("ptb", level="char").info()
    assert info["tokens"] == {"train": 5_101_618, "valid": 399_782, "test": 449_945}
    assert (info["vocabulary"], info["level"]) == (50, "char")


WIKITEXT = " \n = Robert <unk> = \n \n Robert is an @-@ actor . \n He had 2 @,@ 000 roles , \n \n = = Career = = \n \n"


@pytest.mark.parametrize("names", [("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"), None])
def test_wikitext_keeps_blank_lines_and_headings(tmp_path, names):
    more = " in test alone \n"
    args = (WIKITEXT * 2, WIKITEXT, WIKITEXT + more)
    folder_of(tmp_path / "data" / "wikitext-2", *args, *([names] if names else []))
    corpus = open_corpus("wikitext-2")
    # By hand: lines of 0, 4, 0, 6, 7, 0, 5, 0 words and an <eos> each.
    assert corpus.info()["tokens"] == {"train": 60, "valid": 30, "test": 34}
    assert words(corpus, "valid")[:7] == ["<eos>", "=", "Robert", "<unk>", "=", "<eos>", "<eos>"]
    # The published vocabulary is over all splits.
    assert words(corpus, "test")[-4:] == ["in", "test", "alone", "<eos>"]
    assert corpus.info()["unknown_rate"]["valid"] == pytest.approx(1 / 30)


def test_ptb_is_found_under_its_usual_names(tmp_path, monkeypatch):
    text = "the cat <unk> N times \n" * 10
    folder_of(tmp_path / "a" / "penn-treebank", text, text, text)
    folder_of(tmp_path / "b" / "ptb", text, text, text, [f"ptb.{split}.txt" for split in ("train", "valid", "test")])
    found = []
    for name in "ab":
        monkeypatch.setenv("LMNAS_DATA", str(tmp_path / name))
        found.append(open_corpus("ptb"))
    first, second = found
    assert first.fingerprint == second.fingerprint and first.name == "ptb"
    assert first.vocabulary == ["<eos>", "<unk>", "N", "cat", "the", "times"]


def test_pydoc_is_a_small_corpus_without_network(tmp_path, monkeypatch):
    first = open_corpus("pydoc")
    monkeypatch.setenv("LMNAS_CACHE", str(tmp_path / "other"))
    second = open_corpus("pydoc")
    assert first.fingerprint == second.fingerprint and same(first, second)
    tokens = first.info()["tokens"]
    total = sum(tokens.values())
    assert 50_000 < total < 300_000
    assert 0.65 < tokens["train"] / total < 0.9
    assert min(tokens["valid"], tokens["test"]) > 0.04 * total
    assert 1_000 < len(first.vocabulary) < 6_000 and "<unk>" in first.vocabulary
    assert all(0 < rate < 0.2 for rate in first.info()["unknown_rate"].values())


def test_pydoc_paragraph_stays_in_one_split():
    texts = download.pydoc_texts()
    paragraphs = {split: {" ".join(p.split()) for p in text.split("\n\n") if p} for split, text in texts.items()}
    for one, other in itertools.combinations(paragraphs.values(), 2):
        # Short headings may differ in their underlines alone.
        assert not {paragraph for paragraph in one & other if len(paragraph) > 80}


def test_pydoc_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"installed without pydoc_data\.topics"):
        open_corpus("pydoc")


# ------------------------------------------------------------------------------------------------ texts of one's own


def test_file_is_split_in_order_by_shares(tmp_path):
    corpus = open_corpus(
        write(tmp_path / "mine.txt", "".join(f"a b {i:03d}\n" for i in range(100))), split=(0.7, 0.2, 0.1)
    )
    assert corpus.name == "mine.txt"
    assert corpus.info()["tokens"] == {"train": 280, "valid": 80, "test": 40}
    # Numbers of valid and test are not in train.
    assert corpus.info()["unknown_rate"] == {"valid": 0.25, "test": 0.25}
    assert words(corpus, "train")[-4:] == ["a", "b", "069", "<eos>"]


@pytest.mark.parametrize("valid", ["valid.txt", "dev.txt", "val.txt"])
def test_folder(tmp_path, valid):
    text = lines_of_text(20)
    path = folder_of(tmp_path / "mine", text * 2, "", text, ["train.txt", valid, "test.txt"])
    write(tmp_path / "mine" / valid, text + "unseen\n")
    corpus = open_corpus(path)
    assert corpus.name == "mine"
    assert words(corpus, "valid")[-2:] == ["<unk>", "<eos>"]
    assert words(corpus, "test")[:6] == ["alpha", "alpha", "it's", "0", ".", "<eos>"]


def test_words_tokenizer():
    text = 'Don\'t stop: "3.14" costs 1,000 <unk> x_1...\n\n  \nçà et là'
    tokens = list(corpora._Part(lambda: corpora.io.StringIO(text)).tokens("words"))
    expected = ["Don't", "stop", ":", '"', "3.14", '"', "costs", "1,000", "<unk>", "x_1", ".", ".", ".", "<eos>"]
    assert tokens == [expected, [], [], ["çà", "et", "là", "<eos>"]]


def test_characters(tmp_path):
    corpus = open_corpus(write(tmp_path / "mine.txt", "ab é\n\n" * 60), level="char")
    assert words(corpus, "train")[:6] == ["a", "b", " ", "é", "<eos>", "<eos>"]
    assert corpus.vocabulary == ["<eos>", " ", "a", "b", "é", "<unk>"]
    assert corpus.info()["level"] == "char"


@pytest.mark.parametrize("settings", [{}, {"tokenizer": "whitespace"}, {"level": "char"}])
def test_newlines_and_byte_order_mark_do_not_change_tokens(tmp_path, settings):
    text = lines_of_text(200) + "\nthe last line"
    plain = open_corpus(write(tmp_path / "unix.txt", text + "\n"), **settings)
    for name, other in (
        ("no-end", text.encode()),
        ("windows", text.replace("\n", "\r\n").encode() + b"\r\n"),
        ("windows-no-end", text.replace("\n", "\r\n").encode()),
        ("mark", b"\xef\xbb\xbf" + text.encode()),
    ):
        assert same(plain, open_corpus(write(tmp_path / name, other), **settings)), name


@pytest.mark.parametrize("settings", [{}, {"level": "char"}])
def test_single_long_line_is_read_in_pieces(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(corpora, "_PIECE", 50)
    monkeypatch.setattr(corpora, "_CHUNK", 64)
    text = lines_of_text(100).replace("\n", "  ")
    corpus = open_corpus(write(tmp_path / "one-line.txt", text), min_count=1, **settings)
    assert min(corpus.info()["tokens"].values()) > 40
    joined = [token for split in ("train", "valid", "test") for token in words(corpus, split)]
    expected = list(text) if settings else corpora._WORDS.findall(text)
    assert joined == [*expected, "<eos>"]


def test_vocabulary_cut(tmp_path):
    train = "a a a a b b b c c d\n" * 5 + "rare\n"
    path = folder_of(tmp_path / "mine", train, "a b c d e\n" * 5, "a b c d\n" * 5)
    assert open_corpus(path).vocabulary == ["a", "b", "c", "<eos>", "d", "rare", "<unk>"]
    # <unk> stands where its count puts it: d (5) and rare (1) make 6, as many as <eos>.
    cut = open_corpus(path, min_count=6)
    assert cut.vocabulary == ["a", "b", "c", "<eos>", "<unk>"]
    assert cut.info()["unknown_rate"] == {"valid": pytest.approx(2 / 6), "test": pytest.approx(1 / 5)}
    assert open_corpus(path, max_vocabulary=4).vocabulary == ["a", "<unk>", "b", "<eos>"]
    assert len(open_corpus(path, max_vocabulary=7).vocabulary) == 7


def test_a_published_vocabulary_stays_as_it_is(tmp_path, monkeypatch):
    """PTB and WikiText have <unk> in their text; one that has none refuses a new word rather than grow."""
    text = "a b c d\n" * 10
    folder_of(tmp_path / "penn-treebank", text, text, text)
    monkeypatch.setenv("LMNAS_DATA", str(tmp_path))
    corpus = open_corpus("ptb")
    assert corpus.vocabulary == ["<eos>", "a", "b", "c", "d"]
    with pytest.raises(UserError, match="'zebra' is not in the vocabulary of ptb, which has no <unk> token"):
        corpus.encode("a zebra")


def test_a_text_of_ones_own_is_ready_for_new_words(tmp_path):
    text = "a b c d\n" * 10
    corpus = open_corpus(folder_of(tmp_path / "mine", text, text, text))
    assert corpus.vocabulary == ["<eos>", "a", "b", "c", "d", "<unk>"]
    assert [corpus.vocabulary[number] for number in corpus.encode("a zebra").tolist()] == ["a", "<unk>", "<eos>"]
    assert len(open_corpus(str(tmp_path / "mine"), max_vocabulary=5).vocabulary) == 5
    assert open_corpus(str(tmp_path / "mine"), max_vocabulary=4).vocabulary == ["<unk>", "<eos>", "a", "b"]


def test_encode(tmp_path):
    path = folder_of(tmp_path / "mine", "a b <unk>\n" * 20, "a b b\n" * 20, "a b a\n" * 20)
    corpus = open_corpus(path)
    ids = corpus.encode("b zebra\r\na")
    assert ids.dtype == torch.int32
    assert [corpus.vocabulary[number] for number in ids.tolist()] == ["b", "<unk>", "<eos>", "a", "<eos>"]
    assert torch.equal(corpus.encode("a b b\n" * 20), corpus.splits["valid"])
    assert corpus.encode("").shape == (0,)


def test_max_train_tokens(tmp_path):
    path = write(tmp_path / "mine.txt", lines_of_text())
    whole, part = open_corpus(path), open_corpus(path, max_train_tokens=33)
    assert part.vocabulary == whole.vocabulary and part.fingerprint != whole.fingerprint
    assert torch.equal(part.splits["train"], whole.splits["train"][:33])
    assert torch.equal(part.splits["test"], whole.splits["test"])
    assert part.info()["max_train_tokens"] == 33
    assert same(open_corpus(path, max_train_tokens=10**9), whole)


def test_fingerprint_follows_content_and_settings_not_the_path(tmp_path):
    path = write(tmp_path / "mine.txt", lines_of_text())
    copy = write(tmp_path / "elsewhere" / "other.txt", lines_of_text())
    assert open_corpus(path).fingerprint == open_corpus(copy).fingerprint
    assert open_corpus(copy).name == "other.txt"
    prints = [open_corpus(path).fingerprint]
    for settings in (
        {"level": "char"},
        {"tokenizer": "whitespace"},
        {"min_count": 2},
        {"max_vocabulary": 8},
        {"split": (0.6, 0.2, 0.2)},
        {"max_train_tokens": 50},
    ):
        prints.append(open_corpus(path, **settings).fingerprint)
    write(tmp_path / "mine.txt", lines_of_text().replace("beta", "Beta", 1))
    prints.append(open_corpus(path).fingerprint)
    assert len(set(prints)) == len(prints)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)


# -------------------------------------------------------------------------------------------------------- the cache


def test_splits_are_memory_maps_that_never_write_to_the_file(tmp_path):
    path = write(tmp_path / "mine.txt", lines_of_text())
    corpus = open_corpus(path)
    file = tmp_path / "cache" / "corpora" / corpus.fingerprint / "train.npy"
    assert str(file) in Path("/proc/self/maps").read_text() if sys.platform == "linux" else True
    ids = corpus.splits["train"]
    assert ids.dtype == torch.int32 and ids.dim() == 1
    before = file.read_bytes()
    ids[0] = 3
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "no meta", "cut meta", "other meta", "lost", "garbage"])
def test_broken_entry_is_rebuilt(tmp_path, damage):
    path = write(tmp_path / "mine.txt", lines_of_text())
    good = open_corpus(path)
    # Copied, as cutting a mapped file short kills the process that reads it; the cache itself only renames.
    good.splits.update({split: ids.clone() for split, ids in good.splits.items()})
    folder = tmp_path / "cache" / "corpora" / good.fingerprint
    ids, meta = folder / "valid.npy", folder / "meta.json"
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    if damage == "truncated":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "empty":
        ids.write_bytes(b"")
    elif damage == "no meta":
        meta.unlink()
    elif damage == "cut meta":
        meta.write_bytes(meta.read_bytes()[:-10])
    elif damage == "other meta":
        meta.write_text("[1, 2]")
    elif damage == "lost":
        ids.unlink()
    else:
        ids.write_bytes(b"x" * ids.stat().st_size)
    assert same(open_corpus(path), good)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == kept


def test_failed_build_leaves_no_entry(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.txt", lines_of_text())
    monkeypatch.setattr(corpora, "_write", lambda *args: False)
    with pytest.raises(UserError, match=r"the train text of mine\.txt changed while it was read"):
        open_corpus(path)
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []


def test_a_text_that_is_replaced_while_it_is_read_is_not_cached(tmp_path, monkeypatch):
    """The fingerprint is that of the bytes that are tokenised; the text put in their place has the same words."""
    path = Path(write(tmp_path / "mine.txt", lines_of_text()))
    other = Path(write(tmp_path / "other.txt", "".join(reversed(lines_of_text().splitlines(keepends=True)))))
    scan = corpora._scan

    def then_replaced(place):
        found = scan(place)
        os.replace(other, place)
        return found

    monkeypatch.setattr(corpora, "_scan", then_replaced)
    with pytest.raises(UserError, match=r"the train text of mine\.txt changed while it was read; try again"):
        open_corpus(str(path))
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []


def test_entry_is_used_again(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.txt", lines_of_text())
    first = open_corpus(path)
    monkeypatch.setattr(corpora, "_build", None)
    assert same(open_corpus(path), first)


def test_processes_build_at_once(tmp_path):
    path = write(tmp_path / "mine.txt", lines_of_text(20_000))
    code = (
        "import sys; from lmnas.tasks.data.corpora import open_corpus\n"
        "for _ in sys.stdin: corpus = open_corpus(sys.argv[1])\n"
        "print(corpus.fingerprint, sum(int(ids.long().sum()) for ids in corpus.splits.values()))"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-W", "error", "-c", code, path]
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    answers = {process.communicate("go\n")[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    corpus = open_corpus(path)
    assert answers == {f"{corpus.fingerprint} {sum(int(ids.long().sum()) for ids in corpus.splits.values())}\n"}
    names = {file.name for file in (tmp_path / "cache" / "corpora" / corpus.fingerprint).iterdir()}
    assert names == {"train.npy", "valid.npy", "test.npy", "meta.json"}


def test_threads_build_at_once(tmp_path):
    path = write(tmp_path / "mine.txt", lines_of_text(2_000))
    found, barrier = [], threading.Barrier(6)

    def build():
        barrier.wait()
        found.append(open_corpus(path))

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(same(corpus, found[0]) for corpus in found)


@pytest.mark.slow
def test_building_holds_a_fraction_of_the_text(tmp_path):
    rng = random.Random(0)
    block = "".join(" ".join(f"longish-word-{rng.randrange(1000)}" for _ in range(20)) + "\n" for _ in range(2_000))
    n_bytes = 20_000_000
    path = write(tmp_path / "large.txt", block * (n_bytes // len(block) + 1))
    del block
    tracemalloc.start()
    try:
        corpus = open_corpus(path, tokenizer="whitespace")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert corpus.info()["tokens"]["train"] > 900_000
    # What is held does not grow with the text: a chunk of ids as Python integers, and some copies of it.
    assert peak < n_bytes / 2


# -------------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Serve tmp_path/web; `serve(corpus, name, wrong=...)` makes that file the corpus' one download."""
    web = tmp_path / "web"
    web.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(web)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def register(corpus: str, *names: str, wrong: bool = False):
        remotes = []
        for name in names:
            checksum = hashlib.sha256((web / name).read_bytes() + b"!" * wrong).hexdigest()
            remotes.append(download.Remote(f"http://127.0.0.1:{server.server_port}/{name}", checksum))
        monkeypatch.setitem(download.REMOTES, corpus, tuple(remotes))

    yield register
    server.shutdown()
    thread.join()
    server.server_close()


def wikitext_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as bundle:
        for split in ("train", "valid", "test"):
            bundle.writestr(f"wikitext-2/wiki.{split}.tokens", WIKITEXT * 2)


def test_download_of_a_zip(tmp_path, serve, monkeypatch):
    wikitext_zip(tmp_path / "web" / "w.zip")
    serve("wikitext-2", "w.zip")
    corpus = open_corpus("wikitext-2")
    assert corpus.info()["tokens"]["test"] == 60
    folder = tmp_path / "data" / "wikitext-2"
    assert sorted(file.name for file in folder.iterdir()) == [f"wiki.{s}.tokens" for s in ("test", "train", "valid")]
    monkeypatch.setitem(download.REMOTES, "wikitext-2", ())  # the second time needs no network
    assert same(open_corpus("wikitext-2"), corpus)


def test_download_of_single_files(tmp_path, serve):
    names = [f"ptb.{split}.txt" for split in ("train", "valid", "test")]
    for name in names:
        write(tmp_path / "web" / name, "the cat <unk> \n" * 20)
    serve("ptb", *names)
    assert open_corpus("ptb").info()["tokens"]["train"] == 80


def test_wrong_checksum(tmp_path, serve):
    wikitext_zip(tmp_path / "web" / "w.zip")
    serve("wikitext-2", "w.zip", wrong=True)
    with pytest.raises(UserError, match=r"w\.zip does not have the expected checksum.*Put wiki\.train\.tokens"):
        open_corpus("wikitext-2")
    assert list((tmp_path / "data" / "wikitext-2").iterdir()) == []


@pytest.mark.parametrize(("name", "file"), [("ptb", "train.txt"), ("wikitext-103", "wiki.train.tokens")])
def test_no_network(tmp_path, monkeypatch, name, file):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(download.REMOTES, name, (download.Remote("http://127.0.0.1:9/x.txt", "0" * 64),))
    with pytest.raises(UserError) as error:
        open_corpus(name)
    text = str(error.value)
    assert "could not download http://127.0.0.1:9/x.txt" in text and "\n" not in text
    assert f"Put {file}, " in text and str(tmp_path / "data" / name) in text and "LMNAS_DATA" in text


def test_missing_page_and_unwritable_folder(tmp_path, serve, monkeypatch):
    write(tmp_path / "web" / "w.zip", "soon gone")
    serve("wikitext-2", "w.zip")
    (tmp_path / "web" / "w.zip").unlink()
    with pytest.raises(UserError, match=r"could not download .*w\.zip.*\(HTTPError\)"):
        open_corpus("wikitext-2")
    monkeypatch.setenv("LMNAS_DATA", write(tmp_path / "a-file", "x"))
    with pytest.raises(UserError, match=r"could not download it to .*\(Not a directory\)"):
        open_corpus("wikitext-2")


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_unzip_stays_in_its_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr("fine.txt", "x")
        bundle.writestr(name, "x")
    with pytest.raises(UserError, match=r"a\.zip: member .*evil\.txt' points outside"):
        download.unzip(tmp_path / "a.zip", tmp_path / "out" / "deep")
    assert [path.name for path in tmp_path.rglob("*.txt")] == []


def test_unzip_refuses_links_and_other_files(tmp_path):
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match=r"'link\.txt' is a link"):
        download.unzip(tmp_path / "a.zip", tmp_path / "out")
    write(tmp_path / "b.zip", "not one")
    with pytest.raises(UserError, match=r"b\.zip: not a zip file"):
        download.unzip(tmp_path / "b.zip", tmp_path / "out")


def test_addresses_are_complete():
    for name, remotes in download.REMOTES.items():
        for remote in remotes:
            assert remote.url.startswith("https://") and len(remote.checksum) == (
                64 if name in download.PUBLISHED else 32
            )
    assert download.REMOTES.keys() > download.PUBLISHED.keys()


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty; expected text"),
        (b"\xef\xbb\xbf", "is empty; expected text"),
        (b"some text\0more", "is not UTF-8 text: NUL byte at offset 9"),
        (b"caf\xe9 au lait\n" * 50, "is not UTF-8 text: byte 0xe9 at offset 3"),
        (b"\xef\xbb\xbfcaf\xe9\n", "is not UTF-8 text: byte 0xe9 at offset 6"),
        (b"a" * ((1 << 20) - 1) + b"\xc3(", "is not UTF-8 text: byte 0xc3 at offset 1048575"),
        (b"cut \xc3", "is not UTF-8 text: byte 0xc3 at offset 4"),
        ("one two three\n".encode("utf-16"), "is not UTF-8 text: NUL byte at offset 3"),
        (b"ten words of text are not enough to learn from\n", "the train split of mine.txt has 11 tokens; expected at"),
        (b"\n \n" * 100, "the train split of mine.txt has 0 tokens"),
        (b"same\n" * 1000, "mine.txt: distinct tokens that occur 1 times or more: 1; expected at least 2"),
    ],
)
def test_unsuitable_text(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        open_corpus(write(tmp_path / "mine.txt", text))
    assert message in str(error.value) and "mine.txt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_count": 0}, "min_count is 0; expected an integer of at least 1"),
        ({"min_count": -3}, "min_count is -3"),
        ({"min_count": 1.5}, "min_count is 1.5"),
        ({"min_count": True}, "min_count is True"),
        ({"min_count": 10_000}, "distinct tokens that occur 10000 times or more: 0; expected at least 2"),
        ({"max_vocabulary": 3}, "max_vocabulary is 3; expected an integer of at least 4"),
        ({"max_train_tokens": 10}, "max_train_tokens is 10; expected an integer of at least 20"),
        ({"split": (0.8, 0.1, 0.2)}, "split is (0.8, 0.1, 0.2); expected three positive fractions that add up to 1"),
        ({"split": (0.9, 0.1)}, "split is (0.9, 0.1)"),
        ({"split": (1.0, 0.2, -0.2)}, "split is (1.0, 0.2, -0.2)"),
        ({"split": (0.998, 0.001, 0.001)}, "split of mine.txt has"),
        ({"level": "chars"}, "level 'chars' is unknown. Did you mean 'char'?"),
        ({"tokenizer": "word"}, "tokenizer 'word' is unknown. Did you mean 'words'?"),
        ({"tokenizer": "words", "level": "char"}, "tokenizer 'words' was given with level 'char'"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    path = write(tmp_path / "mine.txt", lines_of_text())
    with pytest.raises(UserError) as error:
        open_corpus(path, **settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitext2", "neither a known corpus nor an existing text file or folder. Did you mean 'wikitext-2'?"),
        ("zzzz", "Known: ptb, pydoc, wikitext-103, wikitext-2."),
        ("x" * 5000, "neither a known corpus"),
        ("", "neither a known corpus"),
    ],
)
def test_unknown_name(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        open_corpus(name)
    assert message in str(error.value)


def test_incomplete_folder(tmp_path):
    write(tmp_path / "mine" / "train.txt", lines_of_text())
    write(tmp_path / "mine" / "test.txt", lines_of_text())
    with pytest.raises(UserError, match=r"mine lacks its valid file; expected valid\.txt or dev\.txt or val\.txt"):
        open_corpus(str(tmp_path / "mine"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_unreadable_file(tmp_path):
    path = write(tmp_path / "mine.txt", lines_of_text())
    Path(path).chmod(0)
    with pytest.raises(UserError, match=r"mine\.txt cannot be read: Permission denied"):
        open_corpus(path)


def test_unreadable_file_whoever_asks(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.txt", lines_of_text())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"mine\.txt cannot be read: Permission denied"):
        open_corpus(path)


def test_unwritable_cache(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.txt", lines_of_text())
    monkeypatch.setenv("LMNAS_CACHE", write(tmp_path / "a-file", "x"))
    with pytest.raises(UserError, match=r"cannot write the token cache .*a-file.*Not a directory.*set LMNAS_CACHE"):
        open_corpus(path)


@pytest.mark.parametrize("variable", ["LMNAS_CACHE", "LMNAS_DATA"])
def test_a_home_that_is_not_there(monkeypatch, variable):
    monkeypatch.setenv(variable, "~nosuch/x")
    with pytest.raises(UserError, match=f"{variable} is '~nosuch/x'; expected a folder"):
        open_corpus("ptb" if variable == "LMNAS_DATA" else "pydoc")
