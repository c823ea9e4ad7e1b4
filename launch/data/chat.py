"""Write conversations with a chat template, cut into what the model reads and what it must write itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hift_ds.launch.data.messages import CALLS, REASONING
from hift_ds.launch.data.remarks import Remarks
from hift_ds.launch.errors import UserError, listed, shown

Segment = tuple[str, bool]  # a text, and whether it is trained
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PLACEHOLDER = "\u2042answer\u2042"  # stands for an answer, to find what the template writes after it


@dataclass
class Written:
    """A text to train on, as consecutive segments. The last one is trained, or none is; `answer` is its content."""

    segments: list[Segment]
    answer: str = ""


def write_conversation(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, where: str, remarks: Remarks
) -> list[Written]:
    """Write a conversation with the chat template, cut at the start and end of each trained turn of the assistant.

    A trained segment is what the model must write itself: everything after the generation prompt up to and including
    the end-of-turn mark, but not the whitespace that templates put between turns. The text after the last trained turn
    is dropped.

    Returns:
        One text. Or, if the template writes earlier turns differently when later ones follow (as templates do that keep
        only the latest reasoning), one text for each trained turn, which ends with it: the model is then trained on
        what it reads and writes in use.

    Raises:
        UserError: the template cannot write the conversation, or leaves out what should be trained.
    """
    conversation = _Conversation(tokenizer, messages, tools, where)
    turns = [i for i, message in enumerate(messages) if _is_trained(message)]
    if turns[:1] == [0]:
        # No generation prompt can be written before the first message: nothing asks for it.
        del turns[0]
        remarks.add("assistant first", where)
    for role in dict.fromkeys(message["role"] for message in messages):
        if role not in ROLES:
            remarks.add("other roles", where, role)
    whole = conversation.write(len(messages))
    conversation.check_keys(turns, whole, remarks)
    conversation.check_contents(whole, remarks)
    if not turns:
        return [Written([(whole, False)])]
    answers = [conversation.turn(i) for i in turns]
    if all(whole.startswith(before + answer) for before, answer in answers):
        segments: list[Segment] = []
        done = 0
        for before, answer in answers:
            segments += [(whole[done : len(before)], False), (answer, True)]
            done = len(before) + len(answer)
        return [Written(segments, messages[turns[-1]]["content"])]
    if len(turns) > 1:
        remarks.add("one example a turn", where)
    return [
        Written([(before, False), (answer, True)], messages[i]["content"])
        for i, (before, answer) in zip(turns, answers, strict=True)
    ]


def _is_trained(message: dict[str, Any]) -> bool:
    says_something = message["content"].strip() or any(key in message for key in (*REASONING, *CALLS))
    return message["role"] == "assistant" and bool(says_something) and message.get("weight") != 0


class _Conversation:
    """A conversation, and the template that writes it."""

    def __init__(
        self, tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, where: str
    ) -> None:
        self.tokenizer, self.tools, self.where = tokenizer, tools, where
        self.messages = [{key: value for key, value in one.items() if key != "weight"} for one in messages]
        self._written: dict[tuple[int, bool], str] = {}

    def write(self, n: int, *, generate: bool = False) -> str:
        """Write the first `n` messages, with `generate` up to where the next answer begins."""
        if (n, generate) not in self._written:
            self._written[n, generate] = self._write(self.messages[:n], self.tools, generate)
        return self._written[n, generate]

    def turn(self, i: int) -> tuple[str, str]:
        """Return the text before message `i` with the generation prompt, and what the model must write after it."""
        before, after = self.write(i, generate=True), self.write(i + 1)
        content = self.messages[i]["content"]
        if after.startswith(before):
            answer = after[len(before) :]
            # The generation prompt may hold the opening of the content.
            if not (_holds(answer, content) or _holds(after.removeprefix(self.write(i)), content)):
                raise UserError(
                    f"{self.where}: the chat template does not write the whole content of message {i + 1}: "
                    f"{shown(content)} becomes {shown(answer)}, and the rest would not be trained; shorten the content "
                    "to what the template writes, or use a tokenizer with another template (model.tokenizer)"
                )
        else:
            answer = self._after_opening(i, before, after)
        # A visible mark ends the turn, and whitespace follows it.
        is_marked = not content.strip() or not answer.rstrip().endswith(content.rstrip())
        return before, answer.rstrip() if is_marked else answer

    def _after_opening(self, i: int, before: str, after: str) -> str:
        """Return the answer where the generation prompt has a text that the template does not write in a turn.

        Such a prompt opens the reasoning (`<think>`), and the template leaves the reasoning out of turns. In use, the
        answer follows the opening, so it is what the content has after the same opening, and the end of the turn.
        """
        same = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        opening, content = before[same:].strip(), self.messages[i]["content"].lstrip()
        stand_in = [*self.messages[:i], {**self.messages[i], "content": PLACEHOLDER}]
        _, found, end = self._write(stand_in, self.tools, False).rpartition(PLACEHOLDER)
        if found and opening and content.startswith(opening):
            return content[len(opening) :].lstrip("\n") + end
        raise UserError(
            f"{self.where}: the chat template's generation prompt ends with {shown(before[same:])}, but the template "
            f"writes message {i + 1} without it, so the model would be asked in another way than it is trained; begin "
            f"the assistant's content with {shown(opening)}, the reasoning and its end mark, use a tokenizer with "
            "another template (model.tokenizer), or give prompt and completion columns with data.template=false"
        )

    def check_keys(self, turns: list[int], whole: str, remarks: Remarks) -> None:
        """Find the keys that the template does not write: refuse those to train on, and remark the others.

        A key is written if the text differs without it.
        """
        if self.tools and self._write_or_none(self.messages, None) == whole:
            raise UserError(
                f"{self.where}: the chat template does not write tool definitions; remove the column 'tools', or use a "
                "tokenizer whose template writes them (model.tokenizer)"
            )
        for i, message in enumerate(self.messages):
            for keys in (REASONING, CALLS):
                named = [key for key in keys if key in message]
                # Templates leave the reasoning out of earlier turns, so the message is written as the last one.
                if not named or self._depends_on(keys, i + 1):
                    continue
                if keys == CALLS or i in turns:
                    raise UserError(
                        f"{self.where}: the chat template does not write {named[0]} of message {i + 1}, so it would "
                        f"not be trained; put it into content as the model should write it, remove the key, or use a "
                        "tokenizer whose template writes it (model.tokenizer)"
                    )
                remarks.add("keys not used", self.where, named[0])
        others = dict.fromkeys(key for message in self.messages for key in message)
        for key in others:
            if key not in ("role", "content", *REASONING, *CALLS) and not self._depends_on((key,), len(self.messages)):
                remarks.add("keys not used", self.where, key)

    def check_contents(self, whole: str, remarks: Remarks) -> None:
        """Remark messages that the template leaves out."""
        for i, message in enumerate(self.messages):
            content = message["content"].strip()
            if message["role"] != "assistant" and content not in whole:
                without = [*self.messages[:i], {**message, "content": ""}, *self.messages[i + 1 :]]
                if self._write_or_none(without, self.tools) == whole:
                    remarks.add("messages not written", self.where, message["role"])

    def _depends_on(self, keys: tuple[str, ...], n: int) -> bool:
        without = [{key: value for key, value in one.items() if key not in keys} for one in self.messages[:n]]
        return self._write_or_none(without, self.tools) != self.write(n)

    def _write_or_none(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | None:
        try:
            return self._write(messages, tools, False)
        except UserError:
            return None

    def _write(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, generate: bool) -> str:
        # Most templates expect the arguments of calls as objects, as servers give them, some as their JSON text.
        parsed = [_with_parsed_arguments(message) for message in messages]
        problem: Exception | None = None
        for one in [parsed, *([messages] if parsed != messages else [])]:
            try:
                return self.tokenizer.apply_chat_template(
                    one, tools=tools, tokenize=False, add_generation_prompt=generate
                )
            except Exception as error:  # whatever the template's own code raises
                problem = problem or error
        roles = listed(message["role"] for message in messages)
        raise UserError(
            f"{self.where}: the chat template cannot write the first {len(messages)} of {len(self.messages)} messages "
            f"(roles: {roles}): {str(problem).rstrip('.')}; change the messages, or use a tokenizer with another "
            "template (model.tokenizer)"
        ) from problem


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its tool calls as objects, where they are JSON texts."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_parsed_call(call) for call in message["tool_calls"]]}


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _holds(text: str, content: str) -> bool:
    """Return whether a text holds a content, apart from whitespace, which templates change around reasoning."""
    return "".join(content.split()) in "".join(text.split())
