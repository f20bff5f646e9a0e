"""`stillframe completion`: click's own completion, printed for the shell to read."""

import click
from click.shell_completion import get_completion_class

from stillframe.errors import Unsupported


@click.command(
    epilog="""\b
EXAMPLES
  eval "$(stillframe completion bash)"                          # this shell
  stillframe completion bash > ~/.local/share/bash-completion/completions/stillframe
  stillframe completion zsh > "${fpath[1]}/_stillframe"
  stillframe completion fish > ~/.config/fish/completions/stillframe.fish"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion of commands for SHELL."""
    kind = get_completion_class(shell)
    if kind is None:
        raise Unsupported(f"There is no completion for {shell}")
    click.echo(kind(context.find_root().command, {}, "stillframe", "_STILLFRAME_COMPLETE").source())
