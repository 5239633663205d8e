"""Workers: the code that does the tasks.

    from workers import Context, Failed, task

    @task("agent:hello")
    async def hello(task, ctx: Context, *, name: str = "you") -> str:
        await ctx.delta(f"Hello, {name}!")
        return f"Hello, {name}!"

`taskcast worker MODULE` runs the handlers of a module; `run_task` runs one without any server, for its own tests.
`context.py` is what a handler holds, `handlers.py` what `@task` makes of it, `runtime.py` claims tasks and looks after
them, `attempt.py` sends what is said, `process.py` runs a function in a process of its own, `rehearsal.py` is
`run_task`, `echo.py` an example that shows all of it. `llm.py` asks a language model; `model.py` serves a small one.
"""

from app.events import Usage
from workers.context import Blocking, Child, Context, Decision, Failed
from workers.handlers import task
from workers.process import ProcessDied
from workers.rehearsal import run_task

__all__ = ["Blocking", "Child", "Context", "Decision", "Failed", "ProcessDied", "Usage", "run_task", "task"]
