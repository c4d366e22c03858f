#!/usr/bin/env python3
"""A client of castra's bus in another language: the standard library, nothing else.

Written from docs/PROTOCOL.md alone. As a guest, over TCP:

    bus_client.py --tcp 10.0.2.2:7070 --vm web-0 publish ci/build '{"state": "ok"}'
    bus_client.py --tcp 10.0.2.2:7070 --vm web-0 subscribe broadcast 'ci/*' --from 1
    bus_client.py --tcp 10.0.2.2:7070 --vm web-0 subscribe 'sensor/*/state' --last
    bus_client.py --tcp 10.0.2.2:7070 --vm web-0 subscribe 'jobs/*' --group builders
    bus_client.py --tcp 10.0.2.2:7070 --vm web-0 request time/now null

As the host, over the Unix socket in the project's state root, whose mode is the credential:

    bus_client.py --unix ~/.castra/projects/demo-1a2b3c4d/broker.sock subscribe '*'

`subscribe` prints one JSON object a line and stays: it sends heartbeats, and when the connection
ends it comes back and goes on with the number after the last one, so nothing is missed that the
log still holds. `publish` returns when the message was acknowledged, that is, when it is kept.
A publish whose ack was lost with the connection is sent again: at least once, as everywhere.
"""

import argparse
import json
import os
import random
import secrets
import select
import socket
import struct
import sys
import time

LONGEST_FRAME = (1 << 24) + 4096  # beyond every `max_frame_bytes` a broker can be set to
ANSWER_SECS = 5


class Ended(Exception):
    """The session is over; coming back may help."""


class Declined(Exception):
    """The broker does not want us; coming back with the same hello will not help."""


class Session:
    """One session: the hello, then frames. Never waits longer than it is told to."""

    def __init__(self, connection, vm, token=None):
        self.connection = connection
        self.buffer = b""
        connection.settimeout(ANSWER_SECS)
        if connection.family != socket.AF_UNIX:
            # Frames are small, and each is written in one piece: nothing is to wait for more.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        words = ["hello", "vm:" + vm]
        if token:
            words.append("token=" + token)
        words.append("capabilities=bus-v1")
        # It may be sent before the greeting was read, which saves a round trip.
        self.connection.sendall((" ".join(words) + "\n").encode())
        greeting = self._line()
        if greeting.split()[:2] != ["castra-broker", "1"]:
            raise Declined("this is no broker that we know: " + repr(greeting))
        verdict, *rest = self._line().split() or ["nothing"]
        answer = dict(word.split("=", 1) for word in rest if "=" in word)
        if verdict == "declined":
            reason = answer.get("reason", "no reason given")
            # A broker that stops comes back, and one that has no room has some later.
            if reason in ("shutting-down", "session-limit", "timeout", "storage-error"):
                raise Ended("declined: " + reason)
            raise Declined("declined: " + reason)
        if verdict != "ok" or "session" not in answer:
            raise Declined("the broker has no bus")
        self.name = answer["session"]
        self.heartbeat_secs = float(answer.get("heartbeat_secs", 15))
        self.spoke_at = time.monotonic()
        self.last_id = 0
        self.early = []

    def _more(self):
        try:
            data = self.connection.recv(65536)
        except OSError as error:  # a time-out among them
            raise Ended(str(error)) from error
        if not data:
            # Without a close: it was killed, or we took too little of what it had for us.
            raise Ended("cut off: too slow, or the broker is gone")
        self.buffer += data

    def _line(self):
        while b"\n" not in self.buffer:
            if len(self.buffer) > 512:
                raise Declined("this is no broker: it says no line")
            self._more()
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line.decode("utf-8", "replace").rstrip("\r")

    def send(self, *frames):
        """Sends frames, heads and bodies in one piece; returns their ids."""
        data, ids = b"", []
        for frame in frames:
            self.last_id += 1
            ids.append(self.last_id)
            body = json.dumps({**frame, "id": self.last_id}, separators=(",", ":")).encode()
            data += struct.pack(">I", len(body)) + body
        try:
            self.connection.sendall(data)
        except OSError as error:
            raise Ended(str(error)) from error
        self.spoke_at = time.monotonic()
        return ids

    def frame(self, until):
        """The next frame, or None when it is `until`. Sends heartbeats meanwhile."""
        if self.early:
            return self.early.pop(0)
        while True:
            frame = self._whole_frame()
            if frame is not None:
                if frame.get("type") == "close":
                    raise Ended("the broker closed the session: " + str(frame.get("reason")))
                if frame.get("type") == "ack" and frame.get("ack") == "heartbeat":
                    continue
                return frame
            now = time.monotonic()
            beat_at = self.spoke_at + self.heartbeat_secs
            if now >= beat_at:
                self.send({"type": "heartbeat"})
                continue
            if now >= until:
                return None
            if select.select([self.connection], [], [], min(until, beat_at) - now)[0]:
                self._more()

    def _whole_frame(self):
        if len(self.buffer) < 4:
            return None
        (length,) = struct.unpack(">I", self.buffer[:4])
        if not 0 < length <= LONGEST_FRAME:
            raise Ended("a frame of %d bytes can't be" % length)
        if len(self.buffer) < 4 + length:
            return None  # what is there stays until the rest comes
        body, self.buffer = self.buffer[4 : 4 + length], self.buffer[4 + length :]
        return json.loads(body)

    def acked(self, request):
        """Waits for the ack of a request; what else comes meanwhile is kept for `frame`."""
        until = time.monotonic() + ANSWER_SECS
        others, self.early = self.early, []
        while True:
            frame = self.frame(until)
            if frame is None:
                raise Ended("no ack within %d s" % ANSWER_SECS)
            if frame.get("type") == "ack" and frame.get("id") == request:
                self.early = others
                return frame
            others.append(frame)

    def publish(self, topic, payload, **more):
        """Publishes and waits until the message is kept; its number."""
        (request,) = self.send({"type": "publish", "topic": topic, "payload": payload, **more})
        ack = self.acked(request)
        if ack["status"] != "ok":
            why = ack.get("detail", ack.get("reason"))
            raise ValueError("the broker refused it: " + str(why))
        return ack["seq"]

    def request(self, vm, topic, payload, seconds):
        """Asks, and waits for the first answer; None where none comes in time."""
        # Nobody can guess it, and only this VM and the host may read it.
        reply = "vm:%s/reply/%s" % (vm, secrets.token_hex(8))
        self.subscribe([reply])
        self.publish(topic, payload, reply=reply)
        until = time.monotonic() + seconds
        while True:
            frame = self.frame(until)
            if frame is None or (frame.get("type") == "publish" and frame["topic"] == reply):
                return frame

    def subscribe(self, topics, start=None, last=False, group=None):
        """Subscribes, from a number on if one is given; the last number given so far.

        All in one piece: subscriptions that come together are replayed together, in one order.
        """
        more = {} if start is None or group else {"from": start}
        if last:
            more["last"] = True
        if group:
            more["group"] = group
        requests = self.send(*({"type": "subscribe", "topic": topic, **more} for topic in topics))
        last = []
        for topic, request in zip(topics, requests):
            ack = self.acked(request)
            if ack["status"] != "ok":
                raise ValueError("the broker refused %s: %s" % (topic, ack.get("reason")))
            last.append(ack.get("seq", 0))
        # A message between the acks may be of the first topic already.
        return min(last)


class Bus:
    """Sessions one after the other: whoever is cut off comes back, soon and then less often."""

    def __init__(self, connect, vm, token=None, say=lambda text: None):
        self.connect, self.vm, self.token, self.say = connect, vm, token, say

    def session(self):
        wait = 0.25
        while True:
            try:
                return Session(self.connect(), self.vm, self.token)
            except (OSError, Ended) as error:
                self.say("%s; trying again" % error)
            # Jitter, so that a fleet doesn't come back in one moment.
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(wait * 2, 5)

    def publish(self, topic, payload):
        while True:
            session = self.session()
            try:
                return session.publish(topic, payload)
            except Ended as error:
                self.say("%s; publishing again" % error)
            finally:
                session.connection.close()

    def messages(self, topics, start=None, last=False, group=None):
        """All messages of these topics, in order; gaps as {"gap": {"from": …, "to": …}}.

        With `last` the newest of each topic first. With a group only this one's share, and what
        came while the connection was broken is somebody else's.
        """
        while True:
            session = self.session()
            try:
                given = session.subscribe(topics, start, last, group)
                last = False
                if start is None:
                    # Nothing yet, but from here on nothing is to be missed.
                    start = given + 1
                while True:
                    frame = session.frame(time.monotonic() + 3600)
                    if frame is None:
                        continue
                    kind = frame.pop("type", None)
                    if kind == "publish":
                        start = max(start, frame["seq"] + 1)
                        yield frame
                    elif kind == "gap":
                        start = max(start, frame["to"] + 1)
                        yield {"gap": {"from": frame["from"], "to": frame["to"]}}
                    # Types that a later broker may send are none of our business.
            except Ended as error:
                self.say("%s; going on from %s" % (error, start))
            finally:
                session.connection.close()


def connector(args):
    """What makes a connection."""
    if args.unix:

        def by_unix():
            # A socket's address has room for some 107 bytes: relative to its directory it fits.
            directory, name = os.path.split(os.path.abspath(os.path.expanduser(args.unix)))
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            there = os.open(directory, os.O_RDONLY)
            try:
                connection.connect("/proc/self/fd/%d/%s" % (there, name))
            except OSError:
                connection.close()
                raise
            finally:
                os.close(there)
            return connection

        return by_unix
    host, port = args.tcp.rsplit(":", 1)
    return lambda: socket.create_connection((host, int(port)), timeout=ANSWER_SECS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--tcp", metavar="HOST:PORT", help="as a guest")
    where.add_argument("--unix", metavar="PATH", help="as the host, by broker.sock")
    parser.add_argument("--vm", default="host", help="who we are; over TCP a VM of the project")
    parser.add_argument("--token-file", help="a file that holds this launch's token")
    commands = parser.add_subparsers(dest="command", required=True)
    publish = commands.add_parser("publish")
    publish.add_argument("topic")
    publish.add_argument("payload", type=json.loads, metavar="JSON")
    subscribe = commands.add_parser("subscribe")
    subscribe.add_argument("topics", nargs="+", metavar="TOPIC")
    subscribe.add_argument("--from", dest="start", type=int, help="first number wanted")
    subscribe.add_argument("--last", action="store_true", help="the newest of each topic first")
    subscribe.add_argument("--group", help="share the messages with whoever names it too")
    request = commands.add_parser("request")
    request.add_argument("topic")
    request.add_argument("payload", type=json.loads, metavar="JSON")
    request.add_argument("--timeout", type=float, default=5, help="seconds for the answer")
    subscribe.add_argument("--count", type=int, help="so many messages are enough")
    args = parser.parse_args()

    token = None
    if args.token_file:
        with open(args.token_file, encoding="ascii") as file:
            token = file.read().strip()
    bus = Bus(connector(args), args.vm, token, lambda text: print(text, file=sys.stderr, flush=True))
    if args.command == "publish":
        print(bus.publish(args.topic, args.payload))
        return
    if args.command == "request":
        answer = bus.session().request(args.vm, args.topic, args.payload, args.timeout)
        if answer is None:
            raise ValueError("no answer came within %g s" % args.timeout)
        print(json.dumps(answer["payload"], separators=(",", ":")))
        return
    messages = bus.messages(args.topics, args.start, args.last, args.group)
    for count, message in enumerate(messages, start=1):
        print(json.dumps(message, separators=(",", ":")), flush=True)
        if count == args.count:
            return


if __name__ == "__main__":
    try:
        main()
    except (Declined, ValueError) as error:
        sys.exit("bus_client: %s" % error)
    except BrokenPipeError:
        # Whoever read us has gone. What is still buffered is nobody's any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
