// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// Which backend gets a new connection.
#pragma once
#include "connection.h"

// How many slots are looked at for the backend with the fewest connections.
#define LOOKED_AT 64
// How many backends are tried where another connection of the client's has the same ports.
#define TRIES 4

static __always_inline struct front *front_of(const struct tuple *tuple) {
    struct front_key key = {
        .network = tuple->network,
        .address = tuple->destination,
        .port = tuple->destination_port,
        .protocol = tuple->protocol,
    };
    struct front *front = bpf_map_lookup_elem(&fronts, &key);
    if (front)
        return front;
    key.port = 0;
    key.protocol = 0;
    return bpf_map_lookup_elem(&fronts, &key);
}

// Mixes the bits of a word (the finalizer of MurmurHash3 by Austin Appleby, public domain).
static __always_inline __u32 mix(__u32 bits) {
    bits ^= bits >> 16;
    bits *= 0x85ebca6b;
    bits ^= bits >> 13;
    bits *= 0xc2b2ae35;
    return bits ^ bits >> 16;
}

static __always_inline __u32 hash(const struct address *address) {
    __u32 bits = 0;
    for (int word = 0; word < 4; word++)
        bits = mix(bits ^ bpf_ntohl(address->words[word])) + word;
    return bits;
}

static __always_inline __u32 backend_at(const struct front *front, __u32 slot) {
    if (front->slots <= FRONT_SLOTS)
        return front->first[slot % FRONT_SLOTS];
    struct block_key key = {.front = front->id, .block = slot / BLOCK_SLOTS};
    struct block *block = bpf_map_lookup_elem(&slots, &key);
    return block ? block->backends[slot % BLOCK_SLOTS] : 0;
}

struct search {
    struct front *front;
    __u32 start;
    __u32 found;
    __u32 open;
    __u32 weight;
};

static long compare(__u32 step, struct search *search) {
    __u32 number = backend_at(search->front, (search->start + step) % search->front->slots);
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    // Fewer for its weight than the best until now: open / weight, without a division.
    if (backend && backend->weight &&
        (!search->found ||
         (__u64)backend->open * search->weight < (__u64)search->open * backend->weight)) {
        search->found = number;
        search->open = backend->open;
        search->weight = backend->weight;
    }
    return 0;
}

static __always_inline __u32 least(struct front *front, __u32 start) {
    struct search search = {.front = front, .start = start, .weight = 1};
    __u32 count = front->slots < LOOKED_AT ? front->slots : LOOKED_AT;
    bpf_loop(count, compare, &search, 0);
    return search.found;
}

// The backend by the front's scheduler; `again`: the one before does not do.
static __always_inline __u32 scheduled(struct front *front, const struct address *client, __u32 again) {
    if (!front->slots)
        return 0;
    if (front->scheduler == SCHEDULER_HASH)
        return backend_at(front, (hash(client) + again) % front->slots);
    __u32 turn = __sync_fetch_and_add(&front->turn, 1);
    if (front->scheduler == SCHEDULER_LEAST && !again)
        return least(front, turn);
    return backend_at(front, turn % front->slots);
}

// The backend that a client keeps.
static __always_inline __u32 kept(const struct front *front, const struct client_key *key) {
    struct client *client = bpf_map_lookup_elem(&clients, key);
    if (!client || (__s32)(seconds() - client->seen) >= (__s32)front->affinity)
        return 0;
    __u32 number = client->backend;
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    if (!backend || backend->front != front->id || !backend->weight)
        return 0;
    client->seen = seconds();
    return number;
}

// Has a client keep a backend.
static __always_inline void keep(const struct client_key *key, __u32 number) {
    struct client client = {.backend = number, .seen = seconds()};
    bpf_map_update_elem(&clients, key, &client, BPF_ANY);
}
