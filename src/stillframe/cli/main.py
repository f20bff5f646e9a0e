"""The command `stillframe`: its subcommands by name, and the one place where errors become words and exit codes.

A subcommand's module is imported when it is called, or asked for its own help; `stillframe --help` needs none.
"""

import importlib
import os
import sys
from importlib.util import find_spec

import click

from stillframe import __version__
from stillframe.cli.present import print_error
from stillframe.errors import StillframeError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_COMMANDS = {
    "run": ("run:run", "Run a machine."),
    "save": ("snapshot:save", "Save a machine: memory, devices and disks, under a tag."),
    "load": ("snapshot:load", "Bring a machine back to a tag."),
    "delete": ("snapshot:delete", "Delete a tag of a machine."),
    "list": ("snapshot:list_snapshots", "The snapshots of a machine."),
    "jobs": ("control:jobs", "The jobs of a machine."),
    "cancel": ("control:cancel", "Cancel a job."),
    "stop": ("control:stop", "Pause the guest."),
    "cont": ("control:cont", "Let the guest go on."),
    "quit": ("control:quit", "End a machine."),
    "qmp": ("qmp:qmp", "Speak QMP with a machine: one command, or a shell."),
    "image": ("image:image", "Create, describe, check and snapshot disk images."),
    "doctor": ("doctor:doctor", "What this host can do, and what to do about what it cannot."),
    "demo": ("demo:demo", "A guest saved, wrecked and brought back, with proofs."),
    "completion": ("completion:completion", "Completion of commands for a shell."),
}
"""Name: where it is in `stillframe.cli`, and its line in the overview."""


class _Commands(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return [name for name, (place, _) in _COMMANDS.items() if _is_there(place)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        place = _COMMANDS.get(name, ("", ""))[0]
        if not place or not _is_there(place):
            return None
        module, attribute = place.split(":")
        command = getattr(importlib.import_module(f"stillframe.cli.{module}"), attribute)
        return command if isinstance(command, click.Command) else None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][1]) for name in self.list_commands(context)])


def _is_there(place: str) -> bool:
    return find_spec(f"stillframe.cli.{place.split(':')[0]}") is not None


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"""\b
EXAMPLES
  stillframe demo
  stillframe image create disk.qcow2 10G
  stillframe image snapshot list disk.qcow2

\b
EXIT CODES
  0    done
  {EXIT_FAILED}    refused or failed; the message says what was asked, why not, and what to do
  {EXIT_USAGE}    the command line is wrong
  {EXIT_INTERRUPTED}  interrupted with Ctrl-C; what had been begun was undone
Some commands have further ones, in their own help.""",
)
@click.version_option(__version__, prog_name="stillframe", message="%(prog)s %(version)s")
def cli() -> None:
    """Snapshots of whole virtual machines, in QEMU's words, on ordinary qcow2 files."""


def main() -> None:
    """The program; ends the process."""
    try:
        outcome = cli.main(prog_name="stillframe", standalone_mode=False)
        sys.stdout.flush()
    except StillframeError as error:
        print_error(error)
        code = EXIT_FAILED
    except click.UsageError as error:
        _print_usage_error(error)
        code = EXIT_USAGE
    except click.ClickException as error:
        print(f"stillframe: {error.format_message()}", file=sys.stderr)
        code = EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        print("stillframe: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; there is nobody to tell.
        _drop_output()
        code = EXIT_FAILED
    except OSError as error:
        # Every other room names its own: what is left is our output, as on a disk that is full.
        place = f"'{error.filename}': " if error.filename else "Could not go on: "
        print(f"stillframe: {place}{error.strerror or error}", file=sys.stderr)
        _drop_output()
        code = EXIT_FAILED
    else:
        code = outcome if isinstance(outcome, int) else 0
    sys.exit(code)


def _drop_output() -> None:
    """Let what is still buffered go nowhere, so that the interpreter's end does not stumble over it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_usage_error(error: click.UsageError) -> None:
    print(f"stillframe: {error.format_message()}", file=sys.stderr)
    if error.ctx is not None:
        print(f"  Try '{error.ctx.command_path} --help'.", file=sys.stderr)
