"""Completion scripts for bash, zsh and fish, written from tables of what may stand where.

The scripts know everything themselves: starting Python at each Tab would take seconds. Where nothing here
fits, the shell completes files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

LONGEST = 70  # letters of a description

Words = Mapping[str, str]  # a word that may stand there, and what it means


@dataclass(frozen=True)
class Option:
    """names: such as -o, --output. takes: whether a value follows. values: what that may be, {} if free."""

    names: tuple[str, ...]
    about: str
    takes: bool
    values: Words


@dataclass(frozen=True)
class Place:
    """A subcommand, its words ("" at the top, "glid split"), its options, and what else may stand there."""

    name: str
    options: tuple[Option, ...]
    words: Words


def bash(places: list[Place]) -> str:
    """For bash 4 and newer. `=` ends a word for readline, which therefore is given the rest of it alone."""
    names, values = [], []
    for place in places:
        options = " ".join(name for option in place.options for name in option.names)
        names.append(f"    {_q(place.name)}) options={_q(options)} words={_q(' '.join(place.words))} ;;")
        for option, name in _valued(place):
            values.append(f"    {_q(f'{place.name} {name}')}) words={_q(' '.join(option.values))} ;;")
    takes = "|".join(_q(f"{place.name} {name}") for place, name in _taking(places))
    return f"""# Completion of diptych for bash. Put it into
#   ~/.local/share/bash-completion/completions/diptych
_diptych() {{
  local line=${{COMP_LINE:0:COMP_POINT}} place= options= words= stem= word
  local cur=${{line##*[[:space:]]}} typed before
  COMPREPLY=()
  read -ra typed <<< "${{line%"$cur"}}"
  for word in "${{typed[@]:1}}"; do
    case "$place/$word" in
{_steps(places, "      ")}
    esac
  done
  before=${{typed[${{#typed[@]}}-1]}}
  if [[ $cur == --*=* ]]; then
    before=${{cur%%=*}} cur=${{cur#*=}}
    [[ $COMP_WORDBREAKS == *=* ]] || stem=$before=
  fi
  case "$place" in
{chr(10).join(names)}
  esac
  case "$place $before" in
{chr(10).join(values)}
    {takes}) return ;;
    *) [[ $cur == -* ]] && words=$options ;;
  esac
  COMPREPLY=($(compgen -P "$stem" -W "$words" -- "$cur"))
  [[ $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{cur%"${{cur##*=}}"}}"}}")
  [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2> /dev/null
}}
complete -o bashdefault -o default -F _diptych diptych
"""


def zsh(places: list[Place]) -> str:
    """For zsh with its completion system (compinit)."""
    names, values = [], []
    for place in places:
        options = {name: option.about for option in place.options for name in option.names}
        names.append(
            f"    ({_q(place.name)}) options=({_described(options)}) offers=({_described(place.words)}) ;;"
        )
        for option, name in _valued(place):
            values.append(f"    ({_q(f'{place.name} {name}')}) offers=({_described(option.values)}) ;;")
    takes = "|".join(_q(f"{place.name} {name}") for place, name in _taking(places))
    return f"""#compdef diptych
# Completion of diptych for zsh. Put it as _diptych into a folder of $fpath.
_diptych() {{
  local cur=$words[CURRENT] before=$words[CURRENT-1] place= word
  local -a options offers open typed
  typed=($words[2,CURRENT-1])
  for word in $typed; do
    case "$place/$word" in
{_steps(places, "      ")}
    esac
  done
  if [[ $cur == --*=* ]]; then
    before=${{cur%%=*}}
    compset -P 1 '*='
  fi
  case "$place" in
{chr(10).join(names)}
  esac
  case "$place $before" in
{chr(10).join(values)}
    ({takes}) _files; return ;;
    (*) [[ $cur == -* ]] && offers=($options) ;;
  esac
  open=(${{(M)offers:#*=:*}})
  offers=(${{offers:#*=:*}})
  (( $#open )) && _describe -t settings setting open -S ''
  (( $#offers )) && _describe -t words word offers
  [[ $cur == -* ]] || _files
}}
if [[ $funcstack[1] == _diptych ]]; then _diptych "$@"; else compdef _diptych diptych; fi
"""


def fish(places: list[Place]) -> str:
    """For fish 3 and newer."""
    lines = []
    for place in places:
        at = f"complete -c diptych -n {_fq(f'__diptych_at {_fq(place.name)}')}"
        only = " -f" if place.name in ("", *{p.name.split()[0] for p in places if " " in p.name}) else ""
        for word, about in place.words.items():
            lines.append(f"{at}{only} -a {_fq(word)} -d {_fq(_short(about))}")
        for option in place.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            lines.append(f"{at} {names}{' -r' if option.takes else ''} -d {_fq(_short(option.about))}")
            if option.values:
                pairs = "\\n".join(f"{word}\\t{_short(text)}" for word, text in option.values.items())
                lines.append(f"{at} {names} -x -a {_fq(f'(printf {_fq(pairs + chr(92) + chr(110))})')}")
    return f"""# Completion of diptych for fish. Put it into
#   ~/.config/fish/completions/diptych.fish
function __diptych_at
  set -l place
  for word in (commandline -opc)[2..-1]
    switch "$place/$word"
{_fish_steps(places)}
    end
  end
  test "$place" = "$argv[1]"
end
{chr(10).join(lines)}
"""


WRITERS = {"bash": bash, "zsh": zsh, "fish": fish}


def _steps(places: list[Place], indent: str) -> str:
    """What a word makes of the place before it: /glid -> glid, glid/split -> glid split."""
    return "\n".join(
        f"{indent}{_q(_step(place))}) place={_q(place.name)} ;;" for place in places if place.name
    )


def _fish_steps(places: list[Place]) -> str:
    return "\n".join(
        f"      case {_fq(_step(place))}\n        set place {_fq(place.name)}"
        for place in places
        if place.name
    )


def _step(place: Place) -> str:
    before, _, word = place.name.rpartition(" ")
    return f"{before}/{word}"


def _valued(place: Place) -> Iterator[tuple[Option, str]]:
    """The options whose values are known, by each of their names."""
    yield from ((option, name) for option in place.options if option.values for name in option.names)


def _taking(places: list[Place]) -> Iterator[tuple[Place, str]]:
    """The options that take any value, by each of their names."""
    for place in places:
        for option in place.options:
            if option.takes and not option.values:
                yield from ((place, name) for name in option.names)


def _described(words: Words) -> str:
    """Quoted `word:what it means`, as zsh's _describe reads it."""
    return " ".join(
        _q(f"{word.replace(':', chr(92) + ':')}:{_short(about)}") for word, about in words.items()
    )


def _short(text: str) -> str:
    """A description without what a shell could mistake for something, cut at a word."""
    text = " ".join(re.sub(r"['\"`$\\%\[\]]", "", text).split())
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition(" ")[0] + " ..."


def _q(text: str) -> str:
    """For bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


def _fq(text: str) -> str:
    """For fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
