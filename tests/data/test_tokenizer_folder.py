"""Every form of a tokenizer that transformers reads, with transformers' ids, and kept as it is where it is saved."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data.hub_server import Hub
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from gpt2xla.checkpoint.formats.hugging_face import find_folder
from gpt2xla.data.tokenizer import find_tokenizer, load_tokenizer, train_bpe
from gpt2xla.errors import InputError

TEXTS = [
    "the cat sat on the mat", " leading space", "a<|user|>b <|bot|> c", "x<tool>y <tool> z", "<s>end</s>", "é🙂\n\n\tthe",
    "<|endoftext|>the<|endoftext|>", "the<mask>mat the <mask> mat", "[CLS] the cat [SEP]", "", "<|user|><|user|>",
]  # fmt: skip
DEFINITION = train_bpe(["the cat sat on the mat, the mat. "] * 3, "mine", 280, 2).backend.to_str()
VOCAB = dict(sorted(json.loads(DEFINITION)["model"]["vocab"].items(), key=lambda pair: pair[1]))
END = len(VOCAB)
VOCAB["<|endoftext|>"] = END
MERGES = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in json.loads(DEFINITION)["model"]["merges"]) + "\n"


def token(text: str, **flags: bool) -> dict[str, Any]:
    return (
        dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False) | {"content": text} | flags
    )


def definition(*added: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values = json.loads(DEFINITION) | changes
    values["added_tokens"] += [{"id": END + 1 + number} | one for number, one in enumerate(added)]
    return values


def template(before: str) -> dict[str, Any]:
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    special = {before: {"id": before, "ids": [END], "tokens": [before]}}
    first = {"SpecialToken": {"id": before, "type_id": 0}}
    pair = [first, sequence, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": [first, sequence], "pair": pair, "special_tokens": special}


USER, BOT, TOOL = (
    token("<|user|>", special=True),
    token("<|bot|>", special=True, rstrip=True),
    token("<tool>", lstrip=True),
)
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
PAIR = {"vocab.json": VOCAB, "merges.txt": MERGES}
BERT = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "m", "##at"]) + "\n"

FORMS: dict[str, dict[str, Any]] = {
    "vocab and merges, class in config.json": PAIR | {"config.json": {"model_type": "gpt2"}},
    "vocab and merges, class in tokenizer_config": PAIR | {"tokenizer_config.json": GPT2},
    "prefix space": PAIR | {"tokenizer_config.json": GPT2 | {"add_prefix_space": True}},
    "end of text after the vocabulary": PAIR
    | {"vocab.json": {k: v for k, v in VOCAB.items() if v < END}, "tokenizer_config.json": GPT2},
    "added_tokens.json and special_tokens_map.json": PAIR
    | {
        "tokenizer_config.json": GPT2,
        "added_tokens.json": {"<|user|>": END + 1, "<tool>": END + 2, "<|bot|>": END + 3},
        "special_tokens_map.json": {"pad_token": "<|bot|>", "eos_token": "<|bot|>"}
        | {"additional_special_tokens": ["<|user|>"]},
    },
    "added_tokens_decoder, flags": PAIR
    | {
        "tokenizer_config.json": GPT2
        | {"added_tokens_decoder": {END + 1: USER, END + 2: BOT, END + 3: TOOL}, "eos_token": "<|bot|>"}
    },
    "roberta": {
        "vocab.json": {w: n for n, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *VOCAB, "<mask>"])},
        "merges.txt": MERGES,
        "tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"},
    },
    "tokenizer.json as it is, flags": {"tokenizer.json": definition(USER, BOT, TOOL), "tokenizer_config.json": PLAIN},
    "tokenizer.json, more in its config": {
        "tokenizer.json": definition(USER),
        "tokenizer_config.json": PLAIN
        | {"pad_token": "[PAD]", "additional_special_tokens": ["<tool>"], "eos_token": "<|user|>"},
    },
    "tokenizer.json, GPT-2's class with prefix space": {
        "tokenizer.json": definition(USER, TOOL),
        "tokenizer_config.json": GPT2 | {"add_prefix_space": True, "eos_token": "<|user|>"},
    },
    "tokenizer.json that puts a token before texts": {
        "tokenizer.json": definition(post_processor=template("<|endoftext|>")),
        "tokenizer_config.json": PLAIN | {"bos_token": "<|endoftext|>"},
    },
    "tokenizer.json that cuts and pads": {
        "tokenizer.json": definition(
            truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "!"},
        ),
        "tokenizer_config.json": PLAIN,
    },
    "special tokens are split": {
        "tokenizer.json": definition(USER),
        "tokenizer_config.json": PLAIN | {"split_special_tokens": True},
    },
    "wordpiece's vocab.txt": {"vocab.txt": BERT, "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}},
}  # fmt: skip
CHAT = {
    "inline": ({"chat_template": "{{ messages }}"}, {}),
    "named": ({"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}, {}),
    "file": ({}, {"chat_template.jinja": "{{ messages[0] }}\n"}),
    "files": ({}, {"chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "b"}),
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


def theirs(folder: Path, **options: Any) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def whole(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]


@pytest.mark.parametrize("files", FORMS.values(), ids=FORMS)
def test_ids_are_those_of_transformers_and_the_saved_form_is_the_same(files: dict[str, Any], tmp_path: Path) -> None:
    source, saved = write(tmp_path / "source", files), tmp_path / "saved"
    truth, split = theirs(source), theirs(source, split_special_tokens=True)
    ours = load_tokenizer(str(source))
    saved.mkdir()
    ours.save(saved)
    again, truth_again = load_tokenizer(str(saved)), theirs(saved)
    for tokenizer in (ours, again):
        as_ids = tokenizer.reading_special_tokens()
        for text in TEXTS:
            assert tokenizer.encode(text) == whole(split, text), text
            assert as_ids.encode(text) == whole(truth, text) == whole(truth_again, text), text
        assert tokenizer.eot_id == truth.eos_token_id == truth_again.eos_token_id
        assert tokenizer.id_of("pad_token") == truth.pad_token_id == truth_again.pad_token_id
        assert tokenizer.vocab_size == len(truth)
    assert again.sha256 == ours.sha256
    for name, content in files.items():
        if name != "config.json" and name != "tokenizer.json":
            assert (saved / name).read_text() == (content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(("config", "files"), CHAT.values(), ids=CHAT)
def test_a_chat_template_and_all_other_options_stay(
    config: dict[str, Any], files: dict[str, str], tmp_path: Path
) -> None:
    config = PLAIN | {"padding_side": "left", "model_max_length": 77, "pad_token": "<|endoftext|>"} | config
    source = write(tmp_path / "source", files | {"tokenizer.json": definition(), "tokenizer_config.json": config})
    for hop in ("one", "two"):
        (tmp_path / hop).mkdir()
        load_tokenizer(str(source)).save(tmp_path / hop)
        a, b = theirs(source), theirs(tmp_path / hop)
        assert a.chat_template
        assert a.chat_template == b.chat_template
        assert (a.padding_side, a.model_max_length, a.pad_token) == (b.padding_side, b.model_max_length, b.pad_token)
        assert (a.padding_side, a.model_max_length) == ("left", 77)
        source = tmp_path / hop


def test_without_a_config_what_the_files_say_is_read(tmp_path: Path) -> None:
    for files, truth in ((PAIR, GPT2TokenizerFast), ({"tokenizer.json": definition(USER)}, PreTrainedTokenizerFast)):
        folder = write(tmp_path / truth.__name__, files)
        ours, expected = load_tokenizer(str(folder)), truth.from_pretrained(folder)
        assert ours.eot_id == END
        assert all(ours.reading_special_tokens().encode(text) == whole(expected, text) for text in TEXTS)
    assert load_tokenizer(str(folder / "tokenizer.json")).encode("the") == ours.encode("the")


def refusals() -> Iterator[tuple[str, dict[str, Any], str]]:
    yield "no merges", {"vocab.json": VOCAB, "config.json": {"model_type": "gpt2"}}, "no merges.txt"
    yield "no class", PAIR | {"vocab.json": {"a": 0, "</w>": 1}}, "does not say what kind"
    yield (
        "another class",
        PAIR | {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}},
        "has no vocab.txt|cannot read it",
    )
    yield "not JSON", PAIR | {"vocab.json": "version https://git-lfs", "tokenizer_config.json": GPT2}, "cannot read it"
    yield (
        "broken merges",
        PAIR | {"merges.txt": "#version: 0.2\nno such words here\n", "tokenizer_config.json": GPT2},
        "cannot read it",
    )
    yield (
        "config",
        {"tokenizer.json": definition(), "tokenizer_config.json": "{"},
        "tokenizer_config.json cannot be read",
    )
    yield (
        "options",
        {"tokenizer.json": definition(), "tokenizer_config.json": []},
        "tokenizer_config.json holds no options",
    )
    yield "no vocabulary", {"tokenizer_config.json": GPT2}, "holds neither tokenizer.json nor vocab.json"
    yield "python only", PAIR | {"tokenizer_config.json": {"tokenizer_class": "CTRLTokenizer"}}, "as a fast one"
    yield (
        "no spm",
        {"spiece.model": "\x00", "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}},
        "cannot read it",
    )
    code = {"auto_map": {"AutoTokenizer": ["code.Own", None]}}
    for name, files in (("a program", PAIR), ("a program beside tokenizer.json", {"tokenizer.json": definition()})):
        yield name, files | {"tokenizer_config.json": PLAIN | code, "code.py": "raise SystemExit('it ran')"}, "auto_map"


@pytest.mark.parametrize(("name", "files", "message"), refusals(), ids=[name for name, _, _ in refusals()])
def test_what_transformers_cannot_read_either_is_one_line(
    name: str, files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(str(write(tmp_path / "folder", files)))
    assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer; name the one .* --tokenizer gpt2 \(OpenAI's\)"):
        find_tokenizer(None, tmp_path, 50257)
    assert find_tokenizer("bytes", tmp_path, 300).name == "bytes"
    with pytest.raises(InputError, match="only 255"):
        find_tokenizer("bytes", tmp_path, 255)
    # A special token that was added to the tokenizer alone is never met in text.
    write(tmp_path, {"tokenizer.json": definition(USER), "tokenizer_config.json": PLAIN})
    assert find_tokenizer(None, tmp_path, END + 1).text_vocab_size == END


def test_the_french_tokenizer_of_a_model_is_not_taken_for_openais(tmp_path: Path) -> None:
    """50,257 ids in vocab.json and merges.txt."""
    words = [*list(VOCAB)[:256], "Ġl", "Ġla"]
    vocab = {
        word: number
        for number, word in enumerate(words + [f"unused{i}" for i in range(258, 50256)] + ["<|endoftext|>"])
    }
    write(tmp_path, {"vocab.json": vocab, "merges.txt": "#version: 0.2\nĠ l\nĠl a\n", "tokenizer_config.json": GPT2})
    ours = find_tokenizer(None, tmp_path, 50257)
    assert (ours.vocab_size, ours.eot_id) == (50257, 50256)
    assert ours.encode(" la") == [257]


def test_train_tokenizers_special_tokens_are_read_by_transformers_alike(tmp_path: Path) -> None:
    train_bpe(["the cat <|user|>"], "mine", 300, 1, ["<|user|>", "<|bot|>"]).save(tmp_path)
    ours = load_tokenizer(str(tmp_path))
    for text in TEXTS:
        assert ours.encode(text) == whole(theirs(tmp_path, split_special_tokens=True), text)
        assert ours.reading_special_tokens().encode(text) == whole(theirs(tmp_path), text)


def test_the_hub_is_asked_for_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By --tokenizer and, for its own model, by --model; what neither needs stays there."""
    files = FORMS["added_tokens.json and special_tokens_map.json"] | {"chat_template.jinja": "{{ x }}"}
    model = {"config.json": {"model_type": "gpt2"}, "generation_config.json": {"eos_token_id": 7}, "tf_model.h5": "?"}
    source = write(tmp_path / "source", files | model)
    held = {file.name: file.read_bytes() for file in source.iterdir()}
    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("HF_HUB_DISABLE_XET", True),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    with Hub("some-one/chat", held, kind="models") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        resolve = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        ours = load_tokenizer("some-one/chat")
        folder = find_folder("some-one/chat")
        hub.shutdown()
    assert {file.name for file in folder.iterdir()} == held.keys() - {"tf_model.h5"}
    assert (ours.name, ours.eot_id) == ("some-one/chat", theirs(source).eos_token_id)
    assert (
        load_tokenizer(str(folder)).encode("a<tool>b") == ours.encode("a<tool>b") == whole(theirs(source), "a<tool>b")
    )
