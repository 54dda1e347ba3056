"""Talk with a model in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.flags import Fields, checked
from fewbit.cli.options import Fuse, MaxLength, Model, fused
from fewbit.cli.stdin import stdin
from fewbit.errors import FewbitError, PlanError, in_flags
from fewbit.models.decoding.sampling import Sampling
from fewbit.models.loading import Loading
from fewbit.names import expanded
from fewbit.units import counted

if TYPE_CHECKING:
    from fewbit.models.decoding.chat import Conversation
    from fewbit.models.decoding.generate import Continuation

_HELP = """\
/reset          forget the conversation
/system TEXT    begin anew with this system message; without TEXT, show it
/save FILE      write the conversation as JSON
/exit           end (or Ctrl-D)
Enter sends the message. Alt-Enter, or a backslash before Enter, begins a new line. Ctrl-C ends an answer.
A message that begins with / is sent if you write it with //."""


@checked
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message. Default: the chat template's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens of each answer.")] = 1024,
    sampling: Sampling = Sampling(),
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Show tokens per second after each answer, and how a CPU computes the model."),
    ] = False,
    fuse: Fuse = None,
    max_length: MaxLength = None,
    loading: Annotated[Loading, Fields("adapter", "device", "kernel", "trust_remote_code")] = Loading(),
) -> None:
    """Talk with MODEL in its chat template. A prompt on a pipe is answered once.

    In the conversation, /help lists the commands.
    """
    loading = replace(loading, fuse=fused(fuse, max_length))
    piped = None
    if sys.stdin is None or not sys.stdin.isatty():
        hint = 'Start chat in a terminal, or pipe a message: echo "Hello" | fewbit chat MODEL'
        piped = stdin("no message: stdin", hint).removesuffix("\n")
    from fewbit.api import chat as api

    conversation = api.conversation(model, loading)
    conversation.reset(system)
    if verbose:
        from fewbit.models.decoding.cpu_path import cpu_path

        for name, how in cpu_path(conversation.model).lines if conversation.model.device.type == "cpu" else ():
            print(f"{name}: {how}", file=sys.stderr)
    session = _Session(conversation, max_new_tokens, sampling, verbose)
    if piped is not None:
        session.answer(piped)
    else:
        session.talk()


@dataclass
class _Session:
    conversation: Conversation
    max_new_tokens: int
    sampling: Sampling
    verbose: bool

    def talk(self) -> None:
        """Read messages and commands until the user ends."""
        print("Type a message; /help lists commands, Ctrl-D ends.", file=sys.stderr)
        ask = _prompt()
        while True:
            try:
                line = ask()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if line.strip() in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line.strip():
                    self.answer(line.removeprefix("/") if line.startswith("//") else line)
            except FewbitError as error:
                hint = "" if "Begin a new one" not in error.hint else "/reset begins a new one."
                print(f"error: {in_flags(error.message)}\n  {hint or in_flags(error.hint)}".rstrip(), file=sys.stderr)
            except KeyboardInterrupt:  # a second Ctrl-C, while the prompt was read
                print("\nThe message was dropped.", file=sys.stderr)

    def answer(self, message: str) -> None:
        """Print the answer while it is generated."""
        with _interruptible() as stopped:
            told = self.conversation.answer(
                message,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                tell=lambda text: print(text, end="", flush=True),
                stopped=lambda: bool(stopped),
            )
        print(flush=True)
        if self.verbose:
            print(self._speed(told), file=sys.stderr)

    def _speed(self, told: Continuation) -> str:
        total, fed = self.conversation.prompt
        rate = "" if told.rate is None else f", {told.rate:.1f} tokens/s"
        return f"[{counted(told.tokens, 'token')}{rate}; {fed} of {total} prompt tokens read in {told.to_first:.2g} s]"

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/help":
            print(_HELP, file=sys.stderr)
        elif name == "/reset":
            self.conversation.reset(self.conversation.system)
            print("Forgotten.", file=sys.stderr)
        elif name == "/system" and not rest.strip():
            print(self.conversation.system or "There is no system message.", file=sys.stderr)
        elif name == "/system":
            self.conversation.reset(rest.strip())
            print("The conversation begins anew.", file=sys.stderr)
        elif name == "/save":
            _save(rest.strip(), self.conversation.messages)
        else:
            raise PlanError(
                f"unknown command {name}", "/help lists the commands; // sends a message that begins with /."
            )


def _save(name: str, messages: list[dict[str, str]]) -> None:
    """Write the messages to a new JSON file."""
    from fewbit.system.files import write_json

    if not name:
        raise PlanError("/save without a file", "Give a name: /save chat.json")
    path = Path(expanded(name))
    try:
        if path.exists():
            raise PlanError(f"{path} exists", "Give another name.")
        write_json(path, {"messages": messages})
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror or error}", "Give another name.") from None
    print(f"Saved {len(messages)} messages.", file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """Inside this context, the first Ctrl-C adds an entry to the list, and the second interrupts."""
    pressed: list[bool] = []

    def note(*_: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _prompt() -> Any:
    """A function that reads one message, of one line or several, with editing and history."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        multiline=True,
        key_bindings=keys,
        prompt_continuation="  ",
        output=create_output(always_prefer_tty=True),  # where stdout is a file, the prompt stays out of it
    )
    return lambda: session.prompt("> ")
