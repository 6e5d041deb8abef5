"""One record of a known form -> a conversation in OpenAI form. Each form is a function; errors are reasons.

What is read is passed on as it stands: arguments of tool calls stay the raw text where there is one, and what a
conversation does not need goes to `extra`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from tutelage.data.records import parse_json

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FLAGS = ("trainable", "train", "loss", "weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    **{"system": "system", "function_call": "function_call"},
}


@dataclass(slots=True)
class Conversation:
    """A record on its way to a `Demo`."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, message: dict[str, Any], others: Mapping[str, Any] | None = None) -> None:
        if others:
            self.extra.setdefault("message_fields", {})[str(len(self.messages))] = dict(others)
        self.messages.append(message)

    def count_reserialised(self) -> None:
        self.extra["reserialised_arguments"] = self.extra.get("reserialised_arguments", 0) + 1


def parse_record(record: Mapping[str, Any], form: str = "auto") -> Conversation:
    """The conversation of a record.

    Raises:
        ValueError: it cannot be used; the text is the reason, with the field it lies in.
    """
    present = {k: v for k, v in record.items() if v is not None}
    name = _detect(present) if form == "auto" else form
    needed, optional, parse = FORMS[name]
    missing = [k for k in needed if k not in present]
    if missing:
        null = " (it is null)" if missing[0] in record else ""
        raise ValueError(f'field "{missing[0]}" is needed{null}; the record has {_keys(record)}')
    conversation = Conversation()
    parse(present, conversation)
    others = {k: v for k, v in record.items() if k not in (*needed, *optional) and v is not None}
    if others:
        conversation.extra["record"] = others
    _check(conversation, needed[-1])
    return conversation


def _detect(record: Mapping[str, Any]) -> str:
    for name, (needed, _, _) in FORMS.items():
        if all(k in record for k in needed):
            return name
    wanted = "; ".join(" and ".join(f'"{k}"' for k in needed) for needed, _, _ in FORMS.values())
    raise ValueError(f"no known form: a record needs {wanted}; this one has {_keys(record)}")


def _check(conversation: Conversation, where: str) -> None:
    messages = conversation.messages
    if not messages:
        raise ValueError(f'field "{where}" is empty')
    last = messages[-1]
    if last["role"] != "assistant":
        raise ValueError(f'field "{where}" must end with an assistant turn, ends with "{last["role"]}"')
    if not (last["content"] or "").strip() and not last.get("tool_calls"):
        raise ValueError(f'field "{where}": the last assistant turn is empty')
    if not any(m["role"] == "assistant" and m.get("trainable", True) for m in messages):
        raise ValueError(f'field "{where}": every assistant turn is marked as not to be learned')


# -- the forms -----------------------------------------------------------------------------------


def _messages_form(record: Mapping[str, Any], out: Conversation) -> None:
    _tools(record.get("tools"), out)
    for i, message in enumerate(_list_of(record["messages"], "messages")):
        _message(message, f"messages[{i}]", out)


def _prompt_completion(record: Mapping[str, Any], out: Conversation) -> None:
    _tools(record.get("tools"), out)
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[name]
        if isinstance(value, str):
            out.add({"role": role, "content": _text(value, name, is_empty_allowed=False)})
            continue
        if not isinstance(value, list):
            raise ValueError(f'field "{name}" must be text or a list of messages, got {_kind(value)}')
        start = len(out.messages)
        for i, message in enumerate(value):
            _message(message, f"{name}[{i}]", out)
        if len(out.messages) == start:
            raise ValueError(f'field "{name}" is empty')
        if name == "prompt":
            for message in out.messages:
                if message["role"] == "assistant":
                    message["trainable"] = False
    _system(record.get("system"), out)


def _question_answer(record: Mapping[str, Any], out: Conversation) -> None:
    _system(record.get("system"), out)
    for name, role in (("question", "user"), ("answer", "assistant")):
        out.add({"role": role, "content": _text(record[name], name, is_empty_allowed=False)})


def _alpaca(record: Mapping[str, Any], out: Conversation) -> None:
    _system(record.get("system"), out)
    history = record.get("history", [])
    if not isinstance(history, list):
        raise ValueError(f'field "history" must be a list of [question, answer], got {_kind(history)}')
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f'field "history[{i}]" must be [question, answer], got {_kind(pair)}')
        out.add({"role": "user", "content": _text(pair[0], f"history[{i}][0]")})
        out.add({"role": "assistant", "content": _text(pair[1], f"history[{i}][1]")})
    instruction = _text(record["instruction"], "instruction", is_empty_allowed=False)
    given = _text(record.get("input", ""), "input")
    out.add({"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction})
    out.add({"role": "assistant", "content": _text(record["output"], "output", is_empty_allowed=False)})


def _sharegpt(record: Mapping[str, Any], out: Conversation) -> None:
    _tools(record.get("tools"), out)
    turns = _list_of(record["conversations"], "conversations")
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        if not isinstance(turn, dict):
            raise ValueError(f'field "{where}" must be an object, got {_kind(turn)}')
        if "role" in turn and "from" not in turn:
            _message(turn, where, out)
            continue
        role = _SHAREGPT.get(str(turn.get("from")))
        if role is None:
            raise ValueError(f'field "{where}.from" must be one of {", ".join(_SHAREGPT)}, got {turn.get("from")!r}')
        text = _text(turn.get("value"), f"{where}.value")
        flag = _flag(turn, role, where)
        if role == "function_call":
            message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": _raw_calls(text, where)}
        else:
            message = {"role": role, "content": text}
        others = {k: v for k, v in turn.items() if k not in ("from", "value", *_FLAGS) and v is not None}
        out.add({**message, **flag}, others)
    _system(record.get("system"), out)


Form = tuple[tuple[str, ...], tuple[str, ...], Callable[[Mapping[str, Any], Conversation], None]]
FORMS: Mapping[str, Form] = {
    "messages": (("messages",), ("tools",), _messages_form),
    "sharegpt": (("conversations",), ("tools", "system"), _sharegpt),
    "prompt_completion": (("prompt", "completion"), ("tools", "system"), _prompt_completion),
    "alpaca": (("instruction", "output"), ("input", "system", "history"), _alpaca),
    "question_answer": (("question", "answer"), ("system",), _question_answer),
}
"""Form -> fields it needs, fields it reads besides, and its reader; in the order they are looked for."""


# -- their parts ---------------------------------------------------------------------------------


def _message(raw: Any, where: str, out: Conversation) -> None:
    """One message of OpenAI's form."""
    if not isinstance(raw, dict):
        raise ValueError(f'field "{where}" must be an object, got {_kind(raw)}')
    role = raw.get("role")
    if role is None:
        raise ValueError(f'field "{where}.role" is missing; the message has {_keys(raw)}')
    role = "tool" if role == "function" else role
    if role not in _ROLES:
        raise ValueError(f'field "{where}.role" must be one of {", ".join(_ROLES)}, got {role!r}')
    calls = _calls(raw, where, out)
    if calls and role != "assistant":
        raise ValueError(f'field "{where}.tool_calls": only the assistant calls tools, this is "{role}"')
    content = _content(raw.get("content"), f"{where}.content")
    if content is None and not calls:
        said = "is null" if "content" in raw else "is missing"
        raise ValueError(f'field "{where}.content" {said}; only an assistant turn with tool calls has no content')
    message: dict[str, Any] = {"role": role, "content": content}
    used = {"role", "content", "tool_calls", "function_call", *_FLAGS}
    for name in _REASONING:
        if raw.get(name) is not None and "reasoning_content" not in message:
            message["reasoning_content"] = _text(raw[name], f"{where}.{name}")
            used.add(name)
    if calls:
        message["tool_calls"] = calls
    for name in ("tool_call_id", "name"):
        if raw.get(name) is not None:
            message[name] = _text(raw[name], f"{where}.{name}")
        used.add(name)
    message |= _flag(raw, role, where)
    out.add(message, {k: v for k, v in raw.items() if k not in used and v is not None})


def _content(value: Any, where: str) -> str | None:
    """Text, None, or OpenAI's list of parts, joined where all of them are text."""
    if value is None or isinstance(value, str):
        return value if value is None else _text(value, where)
    if not isinstance(value, list):
        raise ValueError(f'field "{where}" must be text, null or a list of parts, got {_kind(value)}')
    parts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f'field "{where}[{i}]" must be a text part, got {kind or _kind(part)}')
        parts.append(_text(part.get("text"), f"{where}[{i}].text"))
    return "".join(parts)


def _calls(raw: Mapping[str, Any], where: str, out: Conversation) -> list[dict[str, Any]]:
    calls = raw.get("tool_calls")
    if calls is None and raw.get("function_call") is not None:  # OpenAI's form before tools
        calls = [{"function": raw["function_call"]}]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise ValueError(f'field "{where}.tool_calls" must be a list, got {_kind(calls)}')
    return [_call(call, f"{where}.tool_calls[{i}]", out) for i, call in enumerate(calls)]


def _call(call: Any, where: str, out: Conversation) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise ValueError(f'field "{where}" must be an object, got {_kind(call)}')
    function = call["function"] if call.get("function") is not None else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f'field "{where}.function.name" must be the name of a tool; the call has {_keys(call)}')
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
        out.count_reserialised()
    if not isinstance(arguments, str):
        got = _kind(arguments)
        raise ValueError(f'field "{where}.function.arguments" must be JSON text or an object, got {got}')
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    text = _text(arguments, f"{where}.function.arguments")
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": text}}


def _raw_calls(text: str, where: str) -> list[dict[str, Any]]:
    """ShareGPT's function_call: `{"name", "arguments"}` as text, or a list of them. Arguments keep their text."""
    try:
        parsed = parse_json(text)
        items = [text.strip()] if isinstance(parsed, dict) else raw_items(text.strip())
        out = []
        for item in items:
            members = raw_members(item)
            arguments = members["arguments"]
            decoded = json.loads(arguments)
            if not isinstance(decoded, dict | str):
                raise ValueError("arguments")
            name = json.loads(members["name"])
            if not isinstance(name, str) or not name:
                raise ValueError("name")
            arguments = decoded if isinstance(decoded, str) else arguments
            out.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f'field "{where}.value" of a function_call must be JSON with "name" and "arguments", got {text[:80]!r}'
        ) from error
    if not out:
        raise ValueError(f'field "{where}.value" of a function_call holds no call')
    return out


def raw_members(text: str) -> dict[str, str]:
    """Key -> the text of its value, of a JSON object.

    >>> raw_members('{"a": {"x":1.0 },"b":[2]}')
    {'a': '{"x":1.0 }', 'b': '[2]'}
    """
    decoder, at, out = json.JSONDecoder(), _space(text, 1), {}
    if text[0] != "{":
        raise ValueError("not an object")
    while text[at] != "}":
        key, at = scanstring(text, at + 1, True)
        start = _space(text, _space(text, at) + 1)
        _, end = decoder.raw_decode(text, start)
        out[key] = text[start:end]
        at = _space(text, end)
        at = _space(text, at + 1) if text[at] == "," else at
    return out


def raw_items(text: str) -> list[str]:
    """The text of each element of a JSON array."""
    decoder, at, out = json.JSONDecoder(), _space(text, 1), []
    if text[0] != "[":
        raise ValueError("not an array")
    while text[at] != "]":
        _, end = decoder.raw_decode(text, at)
        out.append(text[at:end])
        at = _space(text, end)
        at = _space(text, at + 1) if text[at] == "," else at
    return out


def _space(text: str, at: int) -> int:
    while text[at] in " \t\n\r":
        at += 1
    return at


def _tools(value: Any, out: Conversation) -> None:
    if value is None or value == "":
        return
    for i, tool in enumerate(_list_of(value, "tools")):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'field "tools[{i}]" must be a tool definition with a name, got {_kind(tool)}')
        out.tools.append(tool if "function" in tool else {"type": "function", "function": tool})


def _system(value: Any, out: Conversation) -> None:
    """A record's own system text goes first, unless its messages have one."""
    if value is None or value == "":
        return
    text = _text(value, "system")
    if out.messages and out.messages[0]["role"] == "system":
        raise ValueError('field "system": the messages have a system turn of their own')
    out.messages.insert(0, {"role": "system", "content": text})
    fields = out.extra.get("message_fields")
    if fields:
        out.extra["message_fields"] = {str(int(i) + 1): v for i, v in fields.items()}


def _flag(raw: Mapping[str, Any], role: str, where: str) -> dict[str, bool]:
    """`trainable`, where the record says whether a turn is learned."""
    if raw.get("train_detail") is not None:
        raise ValueError(f'field "{where}.train_detail": learning parts of a turn is not supported')
    said = [(name, raw[name]) for name in _FLAGS if raw.get(name) is not None]
    for name, value in said:
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f'field "{where}.{name}" must be 0, 1, true or false, got {value!r}')
        if bool(value) != bool(said[0][1]):
            raise ValueError(f'field "{where}": {said[0][0]} and {name} contradict each other')
    if not said:
        return {}
    if role not in ("assistant", "function_call"):
        if said[0][1]:
            raise ValueError(f'field "{where}.{said[0][0]}": only assistant turns are learned, this is "{role}"')
        return {}
    return {"trainable": bool(said[0][1])}


def _list_of(value: Any, where: str) -> Sequence[Any]:
    """A list, or the JSON text of one (tables keep nested values as text)."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError(f'field "{where}" is text and must then be a JSON list: {error}') from error
    if not isinstance(value, list):
        raise ValueError(f'field "{where}" must be a list, got {_kind(value)}')
    return value


def _text(value: Any, where: str, *, is_empty_allowed: bool = True) -> str:
    if not isinstance(value, str):
        raise ValueError(f'field "{where}" must be text, got {_kind(value)}')
    if not is_empty_allowed and not value.strip():
        raise ValueError(f'field "{where}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise ValueError(f'field "{where}" holds half a surrogate pair (U+{code:04X}), which no text has') from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the number {value!r}" if isinstance(value, int | float) else type(value).__name__)


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(f'"{k}"' for k in list(record)[:12]) or "no fields"
