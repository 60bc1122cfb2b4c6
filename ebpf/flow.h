// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What the last packet between two addresses has found out, so that the next one need not look. It holds for a short
// time, and until the agent changes what was looked at.
#pragma once
#include "packet.h"

// For how many ticks of the kernel something holds: 25 to 250 ms, as it was configured. Reading them costs one
// instruction.
#define HOLDS 25
// How many flows each processor remembers.
#define FLOW_BITS 11
// Over how many ways of the host's to a node flows are spread, where it has several.
#define SPREAD 8

struct flow_key {
    // The upper 24 bits are the network, the others which of the ways.
    __u32 network;
    // The device that the packets come from; 0: the wire.
    __u32 interface;
    struct address source;
    struct address destination;
};

// By which way of the host's packets leave for a node, and with which Ethernet addresses.
struct exit {
    __u64 until;
    __u32 interface;
    struct mac destination;
    struct mac source;
};

struct flow {
    struct flow_key key;
    // Until when what follows holds, in ticks, and of which generation of the agent's maps it is.
    __u64 until;
    __u64 generation;
    // The container of this node that it is for, if it is for one.
    struct meaning to;
    // Else by which way it gets there; of what the wire brought by which way it would go back.
    struct way way;
    struct exit exit;
    // The number of its next packet in the tunnel (RFC 6864): it begins anywhere.
    __u64 number;
};

// Each processor has its own, at a place that is drawn from the key: what comes there later takes it.
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, flows, __u32, struct flow, 1 << FLOW_BITS, 0);

// How often the agent has changed `addresses` or `ways`: it counts after each change.
MAP(BPF_MAP_TYPE_ARRAY, generation, __u32, __u64, 1, 0);

static __always_inline __u64 current_generation(void) {
    __u32 zero = 0;
    volatile __u64 *count = bpf_map_lookup_elem(&generation, &zero);
    return count ? *count : 0;
}

static __always_inline bool holds(__u64 until) {
    return (__s64)(until - bpf_jiffies64()) > 0;
}

// A multilinear hash of two addresses and something else: its factors are odd and of no meaning, and the products
// are computed beside each other.
static __always_inline __u64
mix_addresses(__u64 other, const struct address *source, const struct address *destination) {
    __u64 sum = other * 0x9e3779b97f4a7c15;
    sum += source->halves[0] * 0xbf58476d1ce4e5b9 + source->halves[1] * 0x94d049bb133111eb;
    sum += destination->halves[0] * 0xd6e8feb86659fd93 + destination->halves[1] * 0xff51afd7ed558ccd;
    return (sum ^ sum >> 32) * 0x9e3779b97f4a7c15;
}

// The place of the flow that a packet belongs to, which came by a device.
static __always_inline __u32 place_of(const struct tuple *tuple, __u32 interface, __u32 spread) {
    __u64 other = (__u64)tuple->network << 40 | (__u64)spread << 32 | interface;
    return mix_addresses(other, &tuple->source, &tuple->destination) >> (64 - FLOW_BITS);
}

// The hash of the connection that a packet belongs to: the kernel's where it has one, since it takes a packet apart
// once more to find that out.
static __always_inline __u32 hash_of(struct __sk_buff *skb, const struct packet *packet) {
    __u32 ports = 0;
    if (skb->hash)
        return skb->hash;
    if (load(skb, packet->transport, &ports, sizeof ports))
        return 0;
    __u32 hash = mix_addresses(ports, &packet->tuple.source, &packet->tuple.destination) >> 32;
    bpf_set_hash(skb, hash);
    return hash;
}

// Whether what is at a place is of this flow, and holds.
static __always_inline bool is_known(
    const struct flow *flow, const struct tuple *tuple, __u32 interface, __u32 spread, __u64 generation) {
    return flow->key.network == (tuple->network << 8 | spread) && flow->key.interface == interface &&
           same(&flow->key.source, &tuple->source) && same(&flow->key.destination, &tuple->destination) &&
           flow->generation == generation && holds(flow->until);
}

// Gives a place to this flow; what it says is still to be found out, in maps of this generation at least.
static __always_inline void begin_flow(
    struct flow *flow, const struct tuple *tuple, __u32 interface, __u32 spread, __u64 generation) {
    flow->key = (struct flow_key){tuple->network << 8 | spread, interface, tuple->source, tuple->destination};
    flow->generation = generation;
    flow->until = 0;
    flow->exit.until = 0;
    flow->number = bpf_get_prandom_u32();
}
