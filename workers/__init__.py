"""Workers: the code that does the tasks.

    from workers import Context, Failed, task

    @task("agent:hello")
    async def hello(task, ctx: Context, *, name: str = "you") -> str:
        await ctx.text(f"Hello, {name}!")
        return f"Hello, {name}!"

`taskcast worker MODULE` runs the handlers of a module. `context.py` is what a handler holds, `handlers.py` what
`@task` makes of it, `runtime.py` claims tasks and looks after them, `echo.py` is an example that shows all of it.
"""

from workers.context import Context, Failed
from workers.handlers import task

__all__ = ["Context", "Failed", "task"]
