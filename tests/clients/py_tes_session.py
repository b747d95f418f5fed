"""What a user of py-tes does, for any of its versions: `python py_tes_session.py URL`; prints what it saw as JSON."""

import json
import sys

import tes
import tes.utils

client = tes.HTTPClient(sys.argv[1], timeout=10)
task = tes.Task(
    name="py-tes",
    inputs=[tes.Input(path="/in/text", content="from py-tes", type="FILE")],
    executors=[tes.Executor(image="alpine", command=["cat", "/in/text"])],
    resources=tes.Resources(cpu_cores=1, ram_gb=0.1),
    tags={"client": "py-tes"},
)
first = client.create_task(task)
client.wait(first, timeout=60)
full = client.get_task(first, view="FULL")
second = client.create_task(tes.Task(executors=[tes.Executor(image="alpine", command=["sleep", "600"])]))
while client.get_task(second, view="MINIMAL").state != "RUNNING":
    pass
client.cancel_task(second)
state = None
while state in (None, "CANCELING"):
    try:
        state = client.get_task(second, view="MINIMAL").state
    except tes.utils.UnmarshalError as error:  # versions before 1.0 do not know the word CANCELING
        if "CANCELING" not in str(error):
            raise
page = client.list_tasks(view="BASIC", page_size=1)
rest = client.list_tasks(view="BASIC", page_size=1, page_token=page.next_page_token)
seen = {
    "state": full.state,
    "stdout": full.logs[0].logs[0].stdout,
    "exit_code": full.logs[0].logs[0].exit_code,
    "sent": [full.name, full.tags, full.inputs[0].content, full.resources.ram_gb],
    "canceled": state,
    "listed": [t.id for t in page.tasks + rest.tasks] == [second, first],
}
json.dump(seen, sys.stdout)
