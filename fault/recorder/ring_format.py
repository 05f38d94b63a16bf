"""Where things lie in the file of a ring; the native tap is compiled with the same numbers.

A header of 4 KiB in words of 8 bytes, an area for names, and the slots of the records. Every word is written by one store,
so a reader sees the old value or the new one. Record n lies in slot (n - 1) modulo the number of slots; its writer sets
``sequence`` to 0, writes the other fields, and sets ``sequence`` to n last. What is stamped later (``enqueued_ns``,
``ended_ns``, flags) are single stores into a record that is whole.

Needs nothing but the standard library.
"""

MAGIC = int.from_bytes(b"evmring\0", "little")
VERSION = 1
WORD_BYTES = 8
HEADER_BYTES = 4096
NAMES_BYTES = 256 << 10
RECORD_BYTES = 64
NUM_SLOTS = 1 << 14
RECORDS_AT = HEADER_BYTES + NAMES_BYTES
RING_BYTES = RECORDS_AT + NUM_SLOTS * RECORD_BYTES
"""1 MiB of records, 256 KiB of names, the header."""

MAGIC_AT, VERSION_AT, SLOTS_AT = 0, 1, 2
"""The magic number is written last: a file without it is being made."""
PID_AT, STARTED_AT, BOOT_AT = 3, 4, 5
"""``STARTED_AT``: clock ticks from the start of the machine to that of the process; ``BOOT_AT``: two words, which life of
the machine it is."""
RANK_AT, WORLD_AT, GENERATION_AT, TIER_AT = 7, 8, 9, 10
WALL_OFFSET_AT, CLOCK_AT = 11, 12
"""Wall clock minus monotonic clock, and the monotonic clock when that was read, nanoseconds."""
NAMES_USED_AT, NAMES_LOST_AT = 13, 14
"""Bytes of names that are whole, and names for which there was no room."""
BEAT_AT = 15
"""Monotonic clock of the last heartbeat."""
MOMENT_AT = 24
"""Step, and phase in the upper half; on a cache line of its own."""
PROGRESS_OF_GROUPS_AT, WORDS_PER_GROUP, NUM_PROGRESS_GROUPS = 64, 3, 128
"""From torch's own counters, by the heartbeat: group, the last of its collectives that was begun, the last that is over."""

STEP_BITS = 32
WORDS_PER_RECORD = RECORD_BYTES // WORD_BYTES
ENQUEUED_WORD, ENDED_WORD, FLAGS_BYTE = 2, 3, 63
"""Of a record."""

TIERS = ("none", "heartbeat", "python", "native")


def defines() -> dict[str, int]:
    """What the native tap is compiled with."""
    from evermesh.fault.recorder.record import DTYPES, OPERATIONS, Flags

    numbers = {
        "MAGIC": MAGIC,
        "VERSION": VERSION,
        "HEADER_BYTES": HEADER_BYTES,
        "NAMES_BYTES": NAMES_BYTES,
        "NUM_SLOTS": NUM_SLOTS,
        "RING_BYTES": RING_BYTES,
        "NAMES_USED_AT": NAMES_USED_AT,
        "NAMES_LOST_AT": NAMES_LOST_AT,
        "MOMENT_AT": MOMENT_AT,
    }
    operations = {f"OPERATION_{name.upper()}": index for index, name in enumerate(OPERATIONS)}
    dtypes = {f"DTYPE_{name.upper()}": index for index, name in enumerate(DTYPES)}
    return numbers | operations | dtypes | {f"FLAG_{flag.name}": int(flag) for flag in Flags}
