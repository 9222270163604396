"""Chat templates: ids and masks against transformers, and against the plain formula where messages spell special tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from chat import chats
from chat.chats import Part

from gpt2xla.chat.conversations import Message
from gpt2xla.chat.template import ChatTemplate
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from gpt2xla.errors import InputError

CHAT = [Message("user", "Hi"), Message("assistant", "Hello!")]
TEMPLATES: dict[str, Callable[[list[Message]], list[Part]]] = {
    "chatml": chats.chatml, "alpaca": chats.alpaca, "borders": chats.borders,
}  # fmt: skip


def small_bpe() -> Tokenizer:
    """With merges across the borders of messages and templates."""
    words = ["Hello the assistant\n\n Hello Bot: Hello User: the\n### Instruction:\n", *chats.HARMLESS] * 3
    return train_bpe(words, "small", 420, 2)


class Case:
    """A template on a tokenizer, ours and transformers', which reads the folder that ours writes."""

    def __init__(self, name: str, tokenizer: Tokenizer, folder: Path) -> None:
        (folder / "borders.jinja").write_text(chats.BORDERS)
        template = ChatTemplate.named(str(folder / "borders.jinja") if name == "borders" else name)
        self.formula = TEMPLATES[name]
        self.seeds = range(500 if tokenizer.name == "gpt2" else 100)
        extended = tokenizer.with_special_tokens(template.missing_tokens(tokenizer))
        template = template.fitted(extended)
        extended.with_chat_template(template.source).save(folder)
        self.ours = load_tokenizer(str(folder))
        found = ChatTemplate.of(self.ours)
        assert found is not None
        self.template = found
        self.theirs = transformers.AutoTokenizer.from_pretrained(folder)

    def expected(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Transformers' own."""
        dicts = [{"role": message.role, "content": message.content} for message in messages]
        found = self.theirs.apply_chat_template(
            dicts, tokenize=True, return_assistant_tokens_mask=True, return_dict=True
        )
        return found["input_ids"], found["assistant_masks"]

    def by_formula(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Special tokens by their ids; each text between two of them as transformers encodes it as letters."""
        ids, trained = [], []
        for part in self.formula(messages):
            if part.is_special:
                found, offsets = [self.theirs.convert_tokens_to_ids(part.text)], [(0, len(part.text))]
            else:
                encoded = self.theirs(
                    part.text, split_special_tokens=True, add_special_tokens=False, return_offsets_mapping=True
                )
                found, offsets = encoded["input_ids"], encoded["offset_mapping"]
            ids += found
            trained += [int(any(a < end and b > start for start, end in part.trained)) for a, b in offsets]
        return ids, trained


@pytest.fixture(scope="module", params=["small", pytest.param("gpt2", marks=pytest.mark.slow)])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return small_bpe() if request.param == "small" else load_tokenizer(request.getfixturevalue("gpt2_encoding"))


@pytest.fixture(scope="module", params=list(TEMPLATES))
def case(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tokenizer, tmp_path_factory.mktemp("tokenizer"))


def test_ids_and_mask_are_those_of_transformers(case: Case) -> None:
    for seed in case.seeds:
        messages = chats.conversation(seed, hostile=False)
        ids, trained = case.template.encode(case.ours, messages)
        assert (ids.tolist(), trained.astype(int).tolist()) == case.expected(messages), messages


def test_no_message_forges_a_role_or_an_end(case: Case) -> None:
    special = case.theirs.convert_tokens_to_ids([token for token, known in case.ours.added.items() if known])
    spelling = 0
    for seed in case.seeds:
        messages = chats.conversation(seed, hostile=True)
        ids, trained = case.template.encode(case.ours, messages)
        assert (ids.tolist(), trained.astype(int).tolist()) == case.by_formula(messages), messages
        written = "".join(part.text for part in case.formula(messages))
        assert case.theirs.decode(ids) == written
        tame = [message._replace(content="x") for message in messages]
        tame_ids = case.template.encode(case.ours, tame)[0]
        assert ids[np.isin(ids, special)].tolist() == tame_ids[np.isin(tame_ids, special)].tolist()
        spelling += any(marker in message.content for message in messages for marker in chats.MARKERS)
    assert spelling > len(case.seeds) / 2


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return small_bpe().with_special_tokens(["<|im_start|>", "<|im_end|>"])


def of_file(tmp_path: Path, source: str) -> ChatTemplate:
    file = tmp_path / "mine.jinja"
    file.write_text(source)
    return ChatTemplate.named(str(file))


def test_last_answer_and_answers_of_a_prompt(small: Tokenizer) -> None:
    chatml = ChatTemplate.named("chatml")
    messages = [*CHAT, Message("user", "And?"), Message("assistant", "Bye.")]
    ids, both = chatml.encode(small, messages)
    _, last = chatml.encode(small, messages, "last-answer")
    assert small.decode(ids[both].tolist()) == "Hello!<|im_end|>Bye.<|im_end|>"
    assert small.decode(ids[last].tolist()) == "Bye.<|im_end|>"
    messages[1] = messages[1]._replace(trained=False)
    again, without_first = chatml.encode(small, messages)
    assert again.tolist() == ids.tolist()
    assert without_first.tolist() == last.tolist()


def test_a_prompt_is_the_beginning_of_its_conversation_and_stop_ids_end_it(case: Case) -> None:
    ends = {"chatml": ["<|im_end|>", "<|endoftext|>"]}.get(case.formula.__name__, ["<|endoftext|>"])
    assert list(case.template.stop_ids(case.ours)) == case.theirs.convert_tokens_to_ids(ends)
    for seed in range(30):
        messages = chats.conversation(seed, hostile=False)
        messages[-1] = Message("assistant", "Hello")
        ids, _ = case.template.encode(case.ours, messages)
        prompt = case.template.prompt_ids(case.ours, messages[:-1])
        dicts = [{"role": message.role, "content": message.content} for message in messages[:-1]]
        theirs = case.theirs.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False)
        assert prompt.tolist() == theirs
        assert ids[: len(prompt)].tolist() == theirs


def test_a_template_that_does_not_begin_with_the_end_of_text_gets_it(small: Tokenizer, tmp_path: Path) -> None:
    template = of_file(tmp_path, chats.BORDERS.replace("{{ bos_token }}", "")).fitted(small)
    assert template.encode(small, CHAT)[0][0] == small.eot_id
    same = of_file(tmp_path, chats.BORDERS).fitted(small)
    assert same.source == chats.BORDERS
    assert template.encode(small, CHAT)[0].tolist() == same.encode(small, CHAT)[0].tolist()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("prompt -%}Bot:", "prompt -%}Bot:{{ ' ' }}", "answers begin; the tokenizer merges its end, ' ', with"),
        ("prompt -%}Bot:", "prompt -%}Robot:", "write with add_generation_prompt what comes before"),
        ("{{ eos_token }}", "", "no special token after an answer"),
        ("{{ eos_token }}\n", "{% endgeneration %}{{ eos_token }}{% generation %}", "the token that ends it"),
        ("message.content }}{{ eos", "message.content | trim }}{{ eos", None),
        ("message.content }}{{ eos", "message.content | upper }}{{ eos", "changes message 2, the assistant's 'the'"),
        ("{{ message.content }}{{ eos_token }}", "{{ eos_token }}", "leaves out message 2, the assistant's"),
        ("{{ message.role | capitalize }}:{{ message.content }}",
         "{% generation %}{{ message.content }}{% endgeneration %}", "has the user's words in"),
        ("{{ message.role | capitalize }}", "<|{{ message.role }}|>", "lacks <|user|>, which the chat template writes"),
        ("{{ message.role | capitalize }}", "{{ raise_exception('no such role') }}", "no such role"),
        ("{%- endfor -%}", "", "Unexpected end of template"),
        ("Bot:{% generation %}", "Bot:{% generation -%}", None),
        ("{% generation %}", "", "does not mark the answers"),
        ("message.role == 'assistant'", "message.role == boundless.role", "boundless"),
    ],
)  # fmt: skip
def test_templates_that_would_not_do_are_refused(
    small: Tokenizer, tmp_path: Path, old: str, new: str, message: str | None
) -> None:
    assert old in chats.BORDERS
    source = chats.BORDERS.replace(old, new)
    if message is None:
        assert of_file(tmp_path, source).fitted(small)
        return
    with pytest.raises(InputError) as error:
        of_file(tmp_path, source).fitted(small).encode(small, CHAT)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_text_that_a_template_changes_is_refused_with_its_message(small: Tokenizer, tmp_path: Path) -> None:
    trims = of_file(tmp_path, chats.BORDERS.replace("message.content }}{{ eos", "message.content | trim }}{{ eos"))
    assert trims.encode(small, CHAT)[1].any()
    with pytest.raises(InputError, match=r"changes message 2, the assistant's ' Hello!\\n'"):
        trims.encode(small, [CHAT[0], Message("assistant", " Hello!\n")])


def test_a_marker_that_any_message_could_spell_is_refused(small: Tokenizer) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as HFTokenizer

    backend = HFTokenizer.from_str(small_bpe().backend.to_str())
    backend.add_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>", special=True)])
    ordinary = Tokenizer("mine", backend, small.special_tokens)
    with pytest.raises(InputError, match="which any message could spell"):
        ChatTemplate.named("chatml").fitted(ordinary)


def test_a_tokenizer_keeps_its_template_and_new_tokens(small: Tokenizer, tmp_path: Path) -> None:
    """Through folders of every layout, with the ids of its text unchanged."""
    first = small_bpe().with_chat_template("one")
    first.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.chat_template == "one"
    (tmp_path / "chat_template.jinja").write_text("two")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|endoftext|>"}')
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.chat_template == transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == "two"
    grown = loaded.with_special_tokens(["<|a|>"]).with_chat_template("three").with_special_tokens(["<|b|>"])
    folder = tmp_path / "grown"
    folder.mkdir()
    grown.save(folder)
    again, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == theirs.chat_template == "three"
    assert again.vocab_size == len(theirs) == first.vocab_size + 2
    assert theirs.convert_tokens_to_ids(["<|a|>", "<|b|>"]) == [first.vocab_size, first.vocab_size + 1]
    assert again.name == "small with <|a|> with <|b|>"
    assert again.sha256 == grown.sha256 != first.sha256
    assert again.encode("Hello the <|a|> 🙂") == first.encode("Hello the <|a|> 🙂")
    assert theirs.eos_token == theirs.bos_token == "<|endoftext|>"
    with pytest.raises(InputError, match=r"cannot take <\|a\|> after its last id"):
        again.with_special_tokens(["<|a|>"])
