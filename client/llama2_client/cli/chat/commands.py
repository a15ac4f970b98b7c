"""The commands of `llama2 chat`, such as /retry and /save."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

from llama2.v1 import account_pb2
from llama2_client.aio.chat import Chat
from llama2_client.cli.output import print_note, print_usage
from llama2_client.reply import Reply

HELP = """\
/clear         remove all turns; the system message stays
/exit          leave; so does Ctrl-D
/help          show this list
/retry         drop the last answer and ask again, with another seed
/save FILE     write the conversation to a new file, as JSON
/system TEXT   set the system message for the next turns; without TEXT, show it
/usage         show the tokens and neurons of this conversation, and the account's usage today
Ctrl-C         stop the reply and drop the turn

A pasted text of several lines is one turn."""

_COMMAND = re.compile(r"(/[a-z]+)(?: +(.*))?")


@dataclass(frozen=True)
class Turn:
    """A question to send; `seed` is None for the seed of the command line."""

    question: str
    seed: int | None = None


class ChatCommands:
    """Runs the commands of a conversation, and remembers what they need.

    Args:
        chat: the conversation.
        get_usage: returns the account's usage since a day.
    """

    def __init__(self, chat: Chat, get_usage: Callable[[date], account_pb2.GetUsageResponse]) -> None:
        self.ended = False  # True after /exit
        self._chat = chat
        self._get_usage = get_usage
        questions = [message.content for message in chat.history if message.role == "user"]
        self._question = questions[-1] if questions else None  # of the last turn, however it ended
        self._replies: list[Reply] = []

    def completed(self, reply: Reply) -> None:
        """Count the reply of a completed turn."""
        self._replies.append(reply)

    def next_turn(self, text: str) -> Turn | None:
        """Return the turn to send; None if the text is a command that sends none.

        Raises:
            Llama2Error: the call of a command fails.
        """
        command = _COMMAND.fullmatch(text.strip())  # a pasted text of several lines never matches
        if command is not None:
            return self._run(command[1], (command[2] or "").strip())
        self._question = text
        return Turn(text)

    def _run(self, command: str, argument: str) -> Turn | None:
        match command:
            case "/retry":
                return self._retry()
            case "/exit" | "/quit":
                self.ended = True
            case "/clear":
                self._chat.clear()
                self._question = None
                print_note("Conversation cleared.")
            case "/help":
                print_note(HELP)
            case "/save":
                print_note(self._save(argument))
            case "/system":
                print_note(self._set_system(argument))
            case "/usage":
                self._print_usage()
            case _:
                print_note(f"Unknown command {command}; /help lists the commands.")
        return None

    def _retry(self) -> Turn | None:
        if self._question is None:
            print_note("Nothing to retry: the conversation has no turn yet.")
            return None
        history = self._chat.history
        if len(history) >= 2 and history[-2].content == self._question:
            self._chat.undo()
        # With the same seed, the model would give the same answer.
        return Turn(self._question, secrets.randbits(64))

    def _save(self, name: str) -> str:
        """Write the conversation to a file. Return the message for the user."""
        if not name:
            return "/save: the file is missing, as in /save story.json"
        conversation = [{"role": message.role, "content": message.content} for message in self._chat.history]
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                json.dump(conversation, file, ensure_ascii=False, indent=2)
                file.write("\n")
        except FileExistsError:
            return f"/save: {name} exists; choose another name"
        except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of an unknown account
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return f"/save: cannot write {name} ({reason}); choose another file"
        return f"Saved {len(conversation)} messages to {name}."

    def _set_system(self, text: str) -> str:
        if text:
            self._chat.system = text
            return "System message set."
        return f"System message: {self._chat.system}" if self._chat.system else "The card's default system message."

    def _print_usage(self) -> None:
        tokens = sum(reply.input_tokens for reply in self._replies), sum(reply.output_tokens for reply in self._replies)
        neurons = sum((reply.neurons for reply in self._replies), Decimal(0))
        turns = f"{len(self._replies)} completed turn{'' if len(self._replies) == 1 else 's'}"
        print_note(f"This conversation: {turns}, {tokens[0]} in, {tokens[1]} out, {neurons} neurons.")
        print_usage(self._get_usage(datetime.now(UTC).date()), as_json=False)
