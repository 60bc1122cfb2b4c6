// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// The maps, of which a node has one of each: keys say of which network an entry is. They are pinned by
// their names, so that they outlive the agent.
#pragma once
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "types.h"

#define MAP(KIND, NAME, KEY, VALUE, ENTRIES, FLAGS)                                                     \
    struct {                                                                                           \
        __uint(type, KIND);                                                                            \
        __uint(max_entries, ENTRIES);                                                                  \
        __uint(map_flags, FLAGS);                                                                      \
        __uint(pinning, LIBBPF_PIN_BY_NAME);                                                           \
        __type(key, KEY);                                                                              \
        __type(value, VALUE);                                                                          \
    } NAME SEC(".maps")

// What the agent writes takes memory as it comes; but addresses, fronts and backends, of which there are many
// and which are written at once, have theirs from the start: writing them costs a third of the time.
MAP(BPF_MAP_TYPE_HASH, addresses, struct place, struct meaning, 1 << 17, 0);
MAP(BPF_MAP_TYPE_LPM_TRIE, ways, struct range, struct way, 1 << 20, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, fronts, struct front_key, struct front, 1 << 16, 0);
MAP(BPF_MAP_TYPE_HASH, slots, struct block_key, struct block, 1 << 18, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, backends, __u32, struct backend, 1 << 17, 0);
MAP(BPF_MAP_TYPE_PERCPU_HASH, counts, __u32, struct counts, 1 << 17, BPF_F_NO_PREALLOC);
// By which gateway a backend of this node meets itself.
MAP(BPF_MAP_TYPE_HASH, gateways, struct place, struct address, 1 << 18, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, timeouts, __u32, struct timeouts, 1 << 16, BPF_F_NO_PREALLOC);
// Where names are answered, what they have, and how that is told.
MAP(BPF_MAP_TYPE_HASH, servers, struct place, __u32, 1 << 14, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, names, struct name_key, struct name, 1 << 17, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, suffixes, struct name_key, __u32, 1 << 13, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_ARRAY, telling, __u32, struct telling, 1, 0);
// A container's packets write here, so these are bounded: what was used longest ago leaves first. The
// agent says how many `connections` there are.
MAP(BPF_MAP_TYPE_LRU_HASH, connections, struct tuple, struct connection, 1 << 18, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, clients, struct client_key, struct client, 1 << 16, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, fragments, struct fragment_key, struct ports, 1 << 14, 0);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, events, __u32, __u64, EVENTS, 0);
// What is wanted to be seen, and what there was to see.
#define REPORT_BYTES (1 << 20)
MAP(BPF_MAP_TYPE_ARRAY, watching, __u32, struct watching, 1, 0);
struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, REPORT_BYTES);
    __uint(pinning, LIBBPF_PIN_BY_NAME);
} reports SEC(".maps");

// The longest that comes after the question of an answer: a record, and what the sender said of itself.
#define TAIL (NOTHING + 16)

// Where a program lays down what its stack of 512 bytes has no room for. Nothing interrupts a program that
// would use it on the same processor.
struct scratch {
    struct tuple tuple;
    struct tuple other;
    struct tuple theirs;
    struct connection connection;
    struct connection back;
    struct report report;
    struct name_key key;
    // Of an answer: what comes after its question.
    __u8 tail[TAIL];
};
struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct scratch);
} scratches SEC(".maps");

// A function that the verifier follows once, by itself, and not in each place where it is called.
#define SEPARATE __attribute__((noinline))

static __always_inline void note(__u32 event) {
    __u64 *count = bpf_map_lookup_elem(&events, &event);
    if (count)
        *count += 1;
}

static __always_inline __u32 seconds(void) {
    return bpf_ktime_get_coarse_ns() / 1000000000;
}
