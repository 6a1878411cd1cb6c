"""aider, scripted as its documentation does it: one message, one answer.

It prints what went wrong and tries again, for 60 s; here for as long as
``RETRY_TIMEOUT_S`` says. What it prints is all that a program gets to know.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

# The user's settings are not its own, and what it would get from the network, a list
# of prices, is there.
home = tempfile.mkdtemp()
atexit.register(shutil.rmtree, home, ignore_errors=True)
os.environ.update(
    HOME=home, LITELLM_LOCAL_MODEL_COST_MAP="True", AIDER_ANALYTICS="false"
)
prices = Path(home, ".aider", "caches", "model_prices_and_context_window.json")
prices.parent.mkdir(parents=True)
prices.write_text("{}")
os.chdir(home)

from aider.coders import Coder, base_coder
from aider.io import InputOutput
from aider.models import Model
from protocol import KEY, MODEL, Left, Outcome, Task, begun, serve

RETRY_TIMEOUT_S = 0.25  # it tries again once, after a quarter of a second


class Output(InputOutput):  # type: ignore[misc]
    """What is said to the user, kept."""

    def __init__(self) -> None:
        super().__init__(pretty=False, yes=True, fancy_input=False)
        self.said: list[str] = []
        self.errors: list[str] = []

    def tool_error(self, message: str = "", strip: bool = True) -> None:
        self.said.append(message)
        self.errors.append(message)

    def tool_warning(self, message: str = "", strip: bool = True) -> None:
        self.said.append(message)

    def tool_output(self, *messages: str, **more: object) -> None:
        self.said += [str(m) for m in messages]


def ask(task: Task, outcome: Outcome) -> None:
    os.environ.update(OPENAI_API_BASE=task.base_url, OPENAI_API_KEY=KEY)
    io = Output()
    model = Model(f"openai/{MODEL}")
    model.extra_params = {"max_tokens": task.max_tokens}
    if not task.retries:
        model.extra_params["max_retries"] = 0
    base_coder.RETRY_TIMEOUT = RETRY_TIMEOUT_S if task.retries else 0.0
    coder = Coder.create(
        main_model=model,
        edit_format="ask",
        io=io,
        stream=task.stream,
        use_git=False,
        map_tokens=0,
        suggest_shell_commands=False,
    )
    # Without its own long instructions: the prompt is the test's.
    coder.gpt_prompts.main_system = "{final_reminders}"
    coder.gpt_prompts.system_reminder = ""
    text = ""
    parts = coder.run_stream(task.prompt)
    for part in parts:
        if part and not text:
            begun()
            if task.leave:
                with contextlib.suppress(StopIteration):
                    parts.throw(KeyboardInterrupt)  # Control-C
                raise Left
        text += part
    outcome.text = coder.partial_response_content
    retries = sum(x.startswith("Retrying in") for x in io.said)
    told = [x for x in io.said if x.strip()]
    outcome.message = " | ".join(told)[:400]
    if retries:
        outcome.message = f"retried {retries} times: {outcome.message}"
    if coder.num_exhausted_context_windows:
        outcome.finish = "length"  # so it tells of that finish reason
    elif io.errors:
        outcome.told = "told"
        raised = (x for x in told if x.startswith("litellm."))
        outcome.error = next(raised, io.errors[0]).split(":")[0]


serve(ask)
