"""measure() and measure_command(): processor seconds that are really there, joules or the reason."""

from __future__ import annotations

import signal
import sys
import threading
import time

import pytest

from sparingly.energy.measurement import measure, measure_command
from sparingly.energy.meters.base import Meter, Reading
from sparingly.energy.records import Record

BURN = "import time\nt=time.process_time()\nwhile time.process_time()-t<{s}: pass\n"


class Steady(Meter):
    """A meter that draws constant power on its own clock, which each reading moves on."""

    source, min_window_s = "steady", 1.0

    def __init__(self, powers_w: list[float]):
        self.powers_w, self.joules, self.at_s = powers_w, 0.0, 0.0

    def unavailable(self) -> str | None:
        return None

    def scopes(self) -> list[str]:
        return ["cpu"]

    def read(self) -> Reading:
        reading = Reading(self.at_s, {"cpu": int(self.joules * 1000)})
        if self.powers_w:
            self.joules += 10 * self.powers_w.pop(0)
        self.at_s += 10
        return reading

    def records(self, start: Reading, end: Reading) -> list[Record]:
        value = (end.counters["cpu"] - start.counters["cpu"]) / 1000
        return [
            Record(
                value,
                value * 0.9,
                value * 1.1,
                "measured",
                "steady",
                "cpu",
                window_s=end.at_s - start.at_s,
                idle_policy="gross",
                n=1,
            )
        ]


class Broken(Steady):
    def read(self) -> Reading:
        raise OSError("counter fell off")


def burn(seconds: float) -> None:
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass


def test_processor_seconds_leave_out_sleep_and_take_in_threads():
    with measure([]) as result:
        time.sleep(0.2)
        thread = threading.Thread(target=burn, args=(0.1,))
        thread.start()
        burn(0.1)
        thread.join()
    assert 0.2 <= result.cpu_s <= result.wall_s + 0.2
    assert result.wall_s >= 0.2 + 0.1
    with measure([]) as asleep:
        time.sleep(0.1)
    assert asleep.cpu_s < 0.1 <= asleep.wall_s


def test_times_are_not_a_number_until_the_block_ends():
    with measure([]) as result:
        assert result.cpu_s != result.cpu_s
        assert result.as_dict()["wall_s"] is None
    assert result.wall_s >= 0


def test_without_a_counter_every_scope_has_a_reason_and_no_zero():
    class Absent(Steady):
        def unavailable(self) -> str | None:
            return "RAPL needs root"

    with measure([Absent([])]) as result:
        pass
    assert result.joules == {}
    assert result.missing == {"cpu": "RAPL needs root"}
    assert [r["value"] for r in result.as_dict()["gross"]] == [None]


def test_gross_without_idle_has_no_net():
    with measure([Steady([30.0])]) as result:
        pass
    assert result.joules == {"cpu": pytest.approx(300)}
    assert result.net == []


def test_net_of_idle_takes_both_errors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    # Readings: idle start, idle end (10 W between), block start, block end (30 W between).
    with measure([Steady([10.0, 0.0, 30.0])], idle_s=10) as result:
        pass
    (gross,), (net,) = result.gross, result.net
    assert (gross.value, gross.idle_policy) == (pytest.approx(300), "gross")
    assert (net.value, net.lo, net.hi) == pytest.approx((200, 270 - 110, 330 - 90))
    assert "net of idle, 10 W" in str(net.idle_policy)


@pytest.mark.parametrize("idle_s", [0.5, -1])
def test_short_idle_windows_are_refused(idle_s: float):
    with pytest.raises(ValueError, match="idle_s"), measure([], idle_s=idle_s):
        pass


def test_a_meter_that_fails_while_reading_is_unavailable_with_its_reason():
    with measure([Broken([])]) as result:
        pass
    assert "counter fell off" in result.missing["cpu"]


def test_the_result_is_filled_when_the_block_raises():
    with pytest.raises(KeyError), measure([Steady([30.0])]) as result:
        raise KeyError("x")
    assert result.wall_s >= 0
    assert result.joules


def test_a_command_is_billed_for_its_own_and_its_childrens_processor_seconds():
    both = (
        "import subprocess, sys\n"
        + BURN.format(s=0.2)
        + f"subprocess.run([sys.executable, '-c', {BURN.format(s=0.2)!r}])"
    )
    result, code = measure_command([sys.executable, "-c", both], [])
    assert code == 0
    assert result.cpu_s >= 0.4
    idle, _ = measure_command([sys.executable, "-c", "import time; time.sleep(0.4)"], [])
    assert idle.cpu_s < 0.4 <= idle.wall_s


@pytest.mark.parametrize(
    "argv, code",
    [
        ([sys.executable, "-c", "raise SystemExit(7)"], 7),
        (["sparingly-no-such-command"], 127),
        (["/"], 126),
        ([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], 128 + 9),
    ],
)
def test_exit_codes_are_those_of_a_shell(argv: list[str], code: int):
    assert measure_command(argv, [])[1] == code


def test_an_empty_command_is_refused():
    with pytest.raises(ValueError, match="argv"):
        measure_command([], [])


def test_interrupts_leave_the_wait_to_the_command_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    # The command interrupts its parent, as Ctrl-C would, outlives its own share of it, and ends in its own time.
    script = (
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(0.2)\nraise SystemExit(5)"
    )
    result, code = measure_command([sys.executable, "-c", script], [])
    assert code == 5
    assert result.wall_s >= 0.2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
