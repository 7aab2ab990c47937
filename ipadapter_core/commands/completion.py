"""``ipadapter completion``: a script with which a shell completes commands, options, their choices and file names."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

from . import Commands

SHELLS = ("bash", "zsh", "fish")
HOW = """
bash:  echo 'eval "$(ipadapter completion bash)"' >> ~/.bashrc
zsh:   echo 'eval "$(ipadapter completion zsh)"' >> ~/.zshrc
fish:  ipadapter completion fish > ~/.config/fish/completions/ipadapter.fish
"""


def add_completion(commands: Commands, root: argparse.ArgumentParser) -> None:
    """Add it to the parser of ``ipadapter``, all of which it describes."""
    p = commands.add_parser(
        "completion",
        help="let the shell complete commands, options and their choices",
        epilog=HOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("shell", choices=SHELLS, help="the shell to print a script for")

    def run(args: argparse.Namespace) -> None:
        print(script(args.shell, root), end="")

    p.set_defaults(json=False, run=run)


def script(shell: str, root: argparse.ArgumentParser) -> str:
    """The script for one of SHELLS."""
    if shell == "fish":
        return _fish(root)
    return (
        _bash(root)
        if shell == "bash"
        else f"autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n{_bash(root)}"
    )


Entry = tuple[tuple[str, ...], argparse.ArgumentParser]


def _parsers(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Every parser by the words that lead to it."""
    yield path, parser
    for name, inner in _inner(parser).items():
        yield from _parsers(inner, (*path, name))


def _inner(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            return dict(action.choices)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return {}


def _about(parser: argparse.ArgumentParser) -> dict[str, str]:
    """What each subcommand does."""
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            return {one.dest: one.help or "" for one in action._choices_actions}  # pyright: ignore
    return {}


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    actions: list[argparse.Action] = parser._actions  # pyright: ignore[reportPrivateUsage]
    return [action for action in actions if action.option_strings]


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """What can come next: subcommands, choices of arguments without a name, and options."""
    plain = [
        str(choice)
        for action in parser._actions  # pyright: ignore[reportPrivateUsage]
        if not action.option_strings and action.choices is not None and not _inner(parser)
        for choice in action.choices
    ]
    return [*_inner(parser), *plain, *(option for action in _options(parser) for option in action.option_strings)]


def _bash(root: argparse.ArgumentParser) -> str:
    cases: list[str] = []
    for path, parser in _parsers(root):
        for action in _options(parser):
            if action.choices is not None:
                options = "|".join(shlex.quote(f"{' '.join(path)} {option}") for option in action.option_strings)
                cases.append(f"    {options}) words={shlex.quote(_lines(map(str, action.choices)))};;")
        cases.append(f"    {shlex.quote(' '.join(path) + ' ')}) words={shlex.quote(_lines(_words(parser)))};;")
    known = "|".join(shlex.quote(" ".join(path)) for path, _ in _parsers(root) if path)
    return f"""_ipadapter() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} path= word words= IFS=$'\\n'
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "${{path:+$path }}$word" in {known}) path="${{path:+$path }}$word";; esac
  done
  case "$path $before" in
{_lines(case for case in cases if not case.split(")")[0].endswith(" '"))}
    *) case "$path " in
{_lines(case for case in cases if case.split(")")[0].endswith(" '"))}
    esac;;
  esac
  COMPREPLY=()
  for word in $words; do
    [[ $word == "$current"* ]] && COMPREPLY+=("$(printf %q "$word")")
  done
}}
complete -o default -o bashdefault -F _ipadapter ipadapter
"""


def _lines(words: Iterator[str] | list[str] | map[str]) -> str:
    return "\n".join(words)


def _fish(root: argparse.ArgumentParser) -> str:
    lines: list[str] = []
    for path, parser in _parsers(root):
        inner = _inner(parser)
        seen = " ".join(inner)
        inside = [f"__fish_seen_subcommand_from {word}" for word in path]
        at = "; and ".join([*inside, f"not __fish_seen_subcommand_from {seen}"] if inner else inside)
        for name, about in _about(parser).items():
            lines.append(f"complete -c ipadapter -f -n {_fished(at)} -a {name} -d {_fished(about)}")
        for action in _options(parser):
            names = " ".join(f"-l {o[2:]}" if o.startswith("--") else f"-s {o[1:]}" for o in action.option_strings)
            takes = "" if action.nargs == 0 else " -r"
            among = "" if action.choices is None else f" -f -a {_fished(_lines([str(one) for one in action.choices]))}"
            about = (action.help or "").split(";")[0]
            lines.append(f"complete -c ipadapter -n {_fished(at or 'true')} {names}{takes}{among} -d {_fished(about)}")
    return _lines(lines) + "\n"


def _fished(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
