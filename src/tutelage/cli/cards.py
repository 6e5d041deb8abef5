"""`tutelage methods`."""

from dataclasses import asdict

from rich.console import Console

from tutelage.cli.main import print_json
from tutelage.errors import ConfigError
from tutelage.methods import METHODS


def show(name: str | None, out: Console, *, as_json: bool) -> None:
    """The cards as a table, or one of them whole."""
    if name is not None and name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown; known: {', '.join(METHODS)}")
    chosen = [m for key, m in METHODS.items() if name in (None, key)]
    if as_json:
        print_json([asdict(m.card) for m in chosen])
        return
    if name is None:
        for m in chosen:
            out.print(f"[bold]{m.card.name}[/]  {m.card.title}")
            for label, text in (
                ("whose", m.card.source),
                ("learned", m.card.signal),
                ("policy", m.card.policy),
                ("when", m.card.when),
            ):
                out.print(f"  [dim]{label:>7}[/]  {text}")
        out.print("tutelage methods NAME shows a card whole, with its settings and their defaults.")
        return
    card = chosen[0].card
    out.print(f"[bold]{card.title}[/] ({card.name})")
    rows = ("what", "source", "signal", "eats", "policy", "when", "gotcha")
    for row in rows:
        out.print(f"  [bold]{row:>7}[/]  {getattr(card, row)}")
    out.print(f"  [bold]{'cite':>7}[/]  {'; '.join(card.cite)}")
    out.print("\n[bold]settings[/]")
    for key, field in chosen[0].settings.model_fields.items():
        kind = field.annotation
        inner = [kind, *getattr(kind, "__args__", ())]
        nested = next((k for k in inner if isinstance(k, type) and hasattr(k, "model_fields")), None)
        if nested is None:
            out.print(f"  {key} = {field.get_default(call_default_factory=True)}  [dim]{field.description or ''}[/]")
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        for sub, f in nested.model_fields.items():
            value = getattr(default, sub) if default is not None else f.get_default(call_default_factory=True)
            shown = "(required)" if default is None and f.is_required() else value
            out.print(f"  {key}.{sub} = {shown}  [dim]{f.description or ''}[/]")
