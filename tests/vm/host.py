"""What the host does for a guest: answers the lines `HOST verb argument` on its console through QMP.

    host.py LOG SOCKET [DEVICE…]      DEVICE: the properties of a drive that can be plugged, key=value,…
"""

import json
import re
import socket
import sys
import time

log, path, *absent = sys.argv[1:]
devices = {}
for text in absent:
    properties = dict(pair.split("=", 1) for pair in text.split(","))
    devices[properties["id"]] = properties


class Machine:
    """A connection to QEMU's monitor, opened at the first request."""

    stream = None

    def send(self, name, **arguments):
        """The answer to a command; events in between are dropped."""
        if self.stream is None:
            self.stream = True
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
            self.stream = connection.makefile("rw")
            self.stream.readline()
            self.send("qmp_capabilities")
        self.stream.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self.stream.flush()
        while True:
            answer = json.loads(self.stream.readline())
            if "return" in answer or "error" in answer:
                return answer.get("return", answer)


def obey(machine, verb, name):
    if verb == "unplug":
        machine.send("device_del", id=name)
    elif verb == "plug":
        machine.send("device_add", **devices[name])
    else:
        print(f"tests/vm: the guest asks the host to {verb}", file=sys.stderr)


taken, machine, down, asleep = 0, Machine(), None, False
while True:
    time.sleep(0.3)
    text = open(log, "rb").read()
    # After a suspend the emulated machine has been seen to stay on.
    if down is None and b"reboot: Power down" in text:
        down = time.monotonic()
    if down is not None and time.monotonic() > down + 15:
        machine.send("quit")
        break
    lines = re.findall(rb"^HOST (\w+) ?(\w*)\r?\n", text, re.M)
    for verb, name in lines[taken:]:
        taken += 1
        if verb == b"wakeup":
            asleep = True
        else:
            obey(machine, verb.decode(), name.decode())
    # It sleeps a moment after it says so; one that woke by itself meanwhile is not waited for.
    if asleep and machine.send("query-status").get("status") == "suspended":
        machine.send("system_wakeup")
        asleep = False
