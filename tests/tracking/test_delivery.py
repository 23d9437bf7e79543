"""What may pass is tried again, what is refused costs only itself, and the end never waits in vain."""

import logging
import threading
import time

import pytest

from spikescale.tracking import delivery as module
from spikescale.tracking.delivery import Delivery


class Store:
    """A store whose state a test sets: `down`, and what it does with single records."""

    def __init__(self):
        self.down = False
        self.got = []
        self.probes = 0

    def probe(self):
        self.probes += 1
        if self.down:
            raise ConnectionError("no answer")

    def start(self):
        self.probe()

    def take(self, what, error=None):
        def send():
            self.probe()
            if error is not None:
                raise error
            self.got.append(what)

        return send

    def delivery(self, **options):
        passing = lambda error: isinstance(error, OSError)  # noqa: E731
        return Delivery(
            "there", self.start, self.probe, passing, **{"retry_seconds": 0.02, "buffer": 100, **options}
        )


@pytest.fixture
def store():
    return Store()


@pytest.fixture(autouse=True)
def _all_messages(caplog):
    caplog.set_level(logging.INFO, logger=module.__name__)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def messages(caplog, words):
    return [record.message for record in caplog.records if words in record.message]


def test_everything_arrives_in_order_and_the_end_comes_last(store):
    delivery = store.delivery()
    for number in range(5):
        delivery.put(store.take(number))
    assert delivery.finish(store.take("end"), 20)
    assert store.got == [0, 1, 2, 3, 4, "end"]
    assert delivery.lost == 0


def test_an_outage_is_said_once_and_so_is_its_end_and_nothing_is_lost(store, caplog):
    store.down = True
    delivery = store.delivery()
    delivery.put(store.take(1))
    until(lambda: store.probes > 4)
    store.down = False
    until(lambda: store.got == [1])
    store.down = True
    delivery.put(store.take(2))
    before = store.probes
    until(lambda: store.probes > before + 4)
    store.down = False
    assert delivery.finish(store.take("end"), 20)
    assert store.got == [1, 2, "end"]
    assert len(messages(caplog, "does not answer (no answer)")) == 2  # one an outage
    assert len(messages(caplog, "is back")) == 2


def test_a_refused_record_costs_only_itself_and_each_kind_is_said_once(store, caplog):
    delivery = store.delivery()
    delivery.put(store.take(1, ValueError("no such thing")))
    delivery.put(store.take(2, ValueError("no such thing")))
    delivery.put(store.take(3, KeyError("other")))
    delivery.put(store.take(4))
    assert not delivery.finish(store.take("end"), 20)
    assert store.got == [4, "end"]
    assert delivery.lost == 3
    assert len(messages(caplog, "does not take a record")) == 2
    assert "3 records did not arrive" in caplog.text


def test_a_file_that_cannot_be_stored_never_holds_up_the_metrics(store, caplog):
    tried = []

    def send():
        tried.append(list(store.got))
        raise PermissionError("read-only")

    delivery = store.delivery(retry_seconds=0.5)
    delivery.put(send, "config.yaml")
    until(lambda: tried)
    delivery.put(store.take(1))
    until(lambda: store.got == [1])
    assert not delivery.finish(store.take("end"), 20)
    assert len(tried) == module.FILE_TRIES
    assert tried[1] == [1]  # between the first try and the second
    assert store.got == [1, "end"]
    assert messages(caplog, "does not take config.yaml: read-only")
    assert messages(caplog, "1 records did not arrive, among them config.yaml")


def test_a_record_that_always_fails_as_if_it_might_pass_lets_the_others_through(store, caplog):
    delivery = store.delivery()
    delivery.put(store.take("poison", OSError("server error")))
    for number in range(3):
        delivery.put(store.take(number))
    until(lambda: messages(caplog, "does not take a record: server error"))
    assert not delivery.finish(store.take("end"), 20)
    assert store.got == [0, 1, 2, "end"]
    assert delivery.lost == 1


def test_a_store_that_cannot_be_used_is_said_in_one_message_and_left_alone(store, caplog):
    def start():
        raise ValueError("experiment x is deleted")

    delivery = Delivery("there", start, store.probe, lambda error: False, retry_seconds=0.02)
    delivery.put(store.take(1))
    until(lambda: "not used for this run" in caplog.text)
    delivery.put(store.take(2))
    assert not delivery.finish(store.take("end"), 20)
    assert store.probes == 1
    assert store.got == []
    assert len(caplog.records) == 1
    assert "experiment x is deleted" in caplog.records[0].message


def test_the_end_wakes_a_sleeping_retry_and_gives_up_early_on_a_store_that_never_answered(
    store, caplog, monkeypatch
):
    monkeypatch.setattr(module, "NEVER_ANSWERED_SECONDS", 1.0)
    monkeypatch.setattr(module, "END_RETRY_SECONDS", 0.02)
    store.down = True
    delivery = store.delivery(retry_seconds=10_000.0)
    delivery.put(store.take(1))
    until(lambda: store.probes == 1)
    assert not delivery.finish(store.take("end"), 10_000.0)  # would outlast the test otherwise
    assert store.probes > 1
    assert "1 records did not arrive (no answer)" in caplog.text


def test_the_end_gets_through_a_full_buffer(store):
    release = threading.Event()
    delivery = store.delivery(buffer=2)
    delivery.put(release.wait)
    until(lambda: store.probes)
    until(lambda: not delivery._records)
    for number in range(5):
        delivery.put(store.take(number))
    release.set()
    assert not delivery.finish(store.take("end"), 20)
    assert store.got == [0, 1, "end"]
    assert delivery.lost == 3


def test_a_run_whose_end_alone_failed_is_said(store, caplog):
    delivery = store.delivery()
    delivery.put(store.take(1))
    assert not delivery.finish(store.take("end", ValueError("no")), 20)
    assert delivery.lost == 0
    assert "could not be marked as ended (no)" in caplog.text
