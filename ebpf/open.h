// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// New connections.
#pragma once
#include "choose.h"

// Whether a packet's source is routed to the device that it came from: who speaks for another opens no
// connection. The kernel drops the packet later; this keeps it from leaving entries here.
static __always_inline bool is_own_source(struct __sk_buff *skb, const struct packet *packet) {
    struct bpf_fib_lookup route = {.ifindex = skb->ifindex};
    if (packet->ipv4) {
        route.family = 2; // AF_INET
        route.ipv4_dst = packet->tuple.source.words[3];
        route.ipv4_src = packet->tuple.destination.words[3];
    } else {
        route.family = 10; // AF_INET6
        __builtin_memcpy(route.ipv6_dst, &packet->tuple.source, sizeof route.ipv6_dst);
        __builtin_memcpy(route.ipv6_src, &packet->tuple.destination, sizeof route.ipv6_src);
    }
    // So the length is not compared with the MTU.
    route.tot_len = 1;
    long result = bpf_fib_lookup(skb, &route, sizeof route, 0);
    return (result == BPF_FIB_LKUP_RET_SUCCESS || result == BPF_FIB_LKUP_RET_NO_NEIGH) &&
           route.ifindex == skb->ifindex;
}

// Writes both entries of a new connection to a backend of a front; gives -1, or the event that keeps it from that.
// Keys are copies: Linux 6.1 looks nothing up under what another function hands on. The connection is that of the
// scratch, where the caller has begun it.
SEPARATE int enter(struct tuple *packet, __u32 front, __u32 number) {
    __u32 zero = 0;
    struct scratch *scratch = bpf_map_lookup_elem(&scratches, &zero);
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    if (!packet || !scratch || !backend || backend->front != front)
        return EVENT_NO_BACKEND;
    struct tuple *tuple = &scratch->tuple, *other = &scratch->other;
    struct connection *new = &scratch->connection, *back = &scratch->back;
    *tuple = *packet;
    new->source = tuple->source;
    new->source_port = tuple->source_port;
    new->destination = backend->address;
    new->destination_port = backend->port ? backend->port : tuple->destination_port;
    new->backend = number;
    new->loops = same(&tuple->source, &backend->address);
    if (new->loops) {
        // It takes no packet from its own address: the gateway speaks to it.
        struct place place = {.network = tuple->network, .address = tuple->source};
        struct address *gateway = bpf_map_lookup_elem(&gateways, &place);
        if (!gateway)
            return EVENT_NO_BACKEND;
        new->source = *gateway;
    }
    other_way(other, tuple, new);
    *back = *new;
    back->source = tuple->destination;
    back->source_port = tuple->destination_port;
    back->destination = tuple->source;
    back->destination_port = tuple->source_port;
    if (bpf_map_update_elem(&connections, other, back, BPF_NOEXIST)) {
        struct connection *there = bpf_map_lookup_elem(&connections, other);
        if (!there)
            return EVENT_TABLE_FULL;
        // One of the same service's, or one that is left over from before, is not in the way.
        bool is_same = same(&there->source, &back->source) && there->source_port == back->source_port;
        if (!is_same) {
            other_way(&scratch->theirs, other, there);
            if (!is_closed(there) && !has_expired(other, there, &scratch->theirs))
                return EVENT_PORT_TAKEN;
            // Nothing of it may be taken for a part of this one.
            bpf_map_delete_elem(&connections, &scratch->theirs);
        }
        if (bpf_map_update_elem(&connections, other, back, BPF_ANY))
            return EVENT_TABLE_FULL;
    }
    if (bpf_map_update_elem(&connections, tuple, new, BPF_ANY)) {
        bpf_map_delete_elem(&connections, other);
        return EVENT_TABLE_FULL;
    }
    __sync_fetch_and_add(&backend->open, 1);
    return -1;
}

// Chooses a backend for the new connection that the scratch has begun, and enters it. Gives whether it did; else
// the kernel has the packet, which has nobody there and says so.
static __always_inline bool open_connection(struct __sk_buff *skb, struct packet *packet) {
    struct tuple *tuple = &packet->tuple;
    struct front *front = front_of(tuple);
    if (!front)
        return false;
    if (!is_own_source(skb, packet)) {
        note(EVENT_FOREIGN_SOURCE);
        return false;
    }
    // Where the agent gives the front's memory to another one right now, it has another number.
    struct client_key key = {.front = front->id, .address = tuple->source};
    __u32 number = front->affinity ? kept(front, &key) : 0;
    int failed = EVENT_NO_BACKEND;
    for (__u32 tries = 0; tries < TRIES; tries++) {
        if (!number)
            number = scheduled(front, &tuple->source, tries);
        failed = enter(tuple, key.front, number);
        if (failed != EVENT_PORT_TAKEN)
            break;
        number = 0;
    }
    if (failed >= 0) {
        refuse(packet, failed);
        return false;
    }
    if (front->affinity)
        keep(&key, number);
    return true;
}
