"""Hosts that do not acknowledge what they are sent, from Linux's table of sockets."""

from __future__ import annotations

from megatron_samoe.parallel_state.silent_hosts import own_address, silent_hosts, unanswered

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
ROW = "   1: 01004D0A:D431 {}:C54F 01 {:08X}:00000000 01:00000014 {:08X}     0        0 123 1 0 20 4 30 10 -1\n"
FOUR, SIX = "02004D0A", "0000000000000000FFFF000003004D0A"


def test_only_unacknowledged_bytes_that_were_sent_again_count() -> None:
    table = HEAD + ROW.format(FOUR, 500, 4) + ROW.format("09004D0A", 500, 1) + ROW.format("08004D0A", 0, 6)
    assert unanswered(table) == {"10.77.0.2"}
    assert unanswered(HEAD + ROW.format(SIX, 1, 3)) == {"10.77.0.3"}
    assert unanswered(HEAD + ROW.format("00" * 15 + "01", 1, 3)) == {"::100:0"}
    assert unanswered(HEAD) == set()


def test_nobody_is_named_without_a_job(monkeypatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert own_address() == "" and silent_hosts({"192.0.2.200": "far"}) == ""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert own_address() == "127.0.0.1"
