// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What a container's socket asks for: a service that it names is its backend from there on, and no packet needs
// to be changed. Where that cannot be, the socket gets what it has asked for, and its packets are balanced.
//
// These programs run for processes, which can be interrupted: they use nothing that is one for each processor but
// to count.
#pragma once
#include "choose.h"
#include "report.h"

// Containers whose sockets are asked, and what these sockets got; the agent says how many there are of these.
MAP(BPF_MAP_TYPE_HASH, namespaces, __u64, struct namespace, 1 << 16, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_LRU_HASH, sockets, __u64, struct socket, 1 << 17, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, datagrams, struct datagram_key, struct datagram, 1 << 17, 0);

// The verdicts on a call.
#define REFUSE 0
#define ALLOW 1

// A service that a socket has named, or what it gets instead.
struct target {
    struct address address;
    __be16 port;
};

static __always_inline struct target target4(const struct bpf_sock_addr *ctx) {
    return (struct target){
        .address.words = {0, 0, bpf_htonl(0xffff), ctx->user_ip4},
        .port = ctx->user_port,
    };
}

static __always_inline struct target target6(const struct bpf_sock_addr *ctx) {
    return (struct target){
        .address.words = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]},
        .port = ctx->user_port,
    };
}

static __always_inline void put4(struct bpf_sock_addr *ctx, const struct target *target) {
    ctx->user_ip4 = target->address.words[3];
    ctx->user_port = target->port;
}

// An address of IPv4 that is mapped into IPv6 stays one.
static __always_inline void put6(struct bpf_sock_addr *ctx, const struct target *target) {
    ctx->user_ip6[0] = target->address.words[0];
    ctx->user_ip6[1] = target->address.words[1];
    ctx->user_ip6[2] = target->address.words[2];
    ctx->user_ip6[3] = target->address.words[3];
    ctx->user_port = target->port;
}

static __always_inline bool
is_target(const struct target *target, const struct address *address, __be16 port) {
    return target->port == port && same(&target->address, address);
}

// Fills in which container asks for a service, as a packet of its would; gives whether it is a container of ours
// that may, and there is such a service.
static __always_inline bool
is_for_service(struct bpf_sock_addr *ctx, const struct target *target, struct tuple *tuple) {
    __u64 number = bpf_get_netns_cookie(ctx);
    struct namespace *namespace = bpf_map_lookup_elem(&namespaces, &number);
    if (!namespace)
        return false;
    for (__u32 at = 0; at < MEMBERSHIPS; at++) {
        struct membership *in = &namespace->networks[at];
        if (!in->network)
            return false;
        struct place place = {.network = in->network, .address = target->address};
        struct meaning *meaning = bpf_map_lookup_elem(&addresses, &place);
        if (!meaning || meaning->kind != ADDRESS_SERVICE)
            continue;
        tuple->network = in->network;
        tuple->source = is_mapped(&target->address) ? in->ipv4 : in->ipv6;
        tuple->destination = target->address;
        tuple->destination_port = target->port;
        tuple->protocol = ctx->protocol;
        return true;
    }
    return false;
}

// Chooses the backend of a service; gives its number, 0: nobody takes it. `again`: the one before does not do.
static __always_inline __u32 choose(const struct tuple *tuple, struct target *got, __u32 again) {
    struct front *front = front_of(tuple);
    if (!front)
        return 0;
    // Where the agent gives the front's memory to another one right now, it has another number.
    struct client_key client = {.front = front->id, .address = tuple->source};
    __u32 number = front->affinity && !again ? kept(front, &client) : 0;
    if (!number)
        number = scheduled(front, &tuple->source, again);
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    if (!backend || backend->front != client.front)
        return 0;
    if (front->affinity)
        keep(&client, number);
    got->address = backend->address;
    got->port = backend->port ? backend->port : tuple->destination_port;
    return number;
}

// Counts that a backend got a connection; gives whether it is still there. Interrupts count too.
static __always_inline bool opened(__u32 number) {
    struct counts *counted;
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    if (!backend || !is_there(number, &counted))
        return false;
    __sync_fetch_and_add(&backend->open, 1);
    if (counted)
        __sync_fetch_and_add(&counted->connections, 1);
    return true;
}

// A socket's connection to a backend has ended.
static __always_inline void closed(__u64 number, const struct socket *socket) {
    leave(socket->number);
    bpf_map_delete_elem(&sockets, &number);
}

// Shows those who watch what a socket gets, or why nothing: one more than the event.
static __always_inline void show(const struct tuple *tuple, const struct target *got, __u8 reason) {
    const struct watching *wants = wanted();
    if (!wants || (!wants->every && !reason) || (wants->network && wants->network != tuple->network))
        return;
    struct report report = {
        .time = bpf_ktime_get_ns(),
        .network = tuple->network,
        .source = tuple->source,
        .destination = tuple->destination,
        .destination_port = tuple->destination_port,
        .protocol = tuple->protocol,
        .point = POINT_SOCKET,
        .verdict = reason ? VERDICT_DROPPED : VERDICT_CARRIED,
        .reason = reason,
        .is_translated = !reason,
    };
    if (!reason) {
        report.translated = got->address;
        report.translated_port = got->port;
    }
    hand_over(&report);
}
