// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What a container's socket asks for: a service that it names is its backend from there on, and no packet needs
// to be changed. Where that cannot be, the socket gets what it has asked for, and its packets are balanced.
#pragma once
#include "choose.h"
#include "report.h"

// The verdict on a call: there is no other here.
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

static __always_inline int put4(struct bpf_sock_addr *ctx, const struct target *target) {
    ctx->user_ip4 = target->address.words[3];
    ctx->user_port = target->port;
    return ALLOW;
}

// An address of IPv4 that is mapped into IPv6 stays one.
static __always_inline int put6(struct bpf_sock_addr *ctx, const struct target *target) {
    ctx->user_ip6[0] = target->address.words[0];
    ctx->user_ip6[1] = target->address.words[1];
    ctx->user_ip6[2] = target->address.words[2];
    ctx->user_ip6[3] = target->address.words[3];
    ctx->user_port = target->port;
    return ALLOW;
}

static __always_inline bool is_target(const struct target *target, const struct address *address, __be16 port) {
    return target->port == port && same(&target->address, address);
}

// Who asks for what: the container in the network that has the service.
struct question {
    struct tuple tuple;
    struct client_key client;
};

// Fills in who asks for a service; gives whether it is a container of ours that may, and there is such a service.
static __always_inline bool
is_for_service(struct bpf_sock_addr *ctx, const struct target *target, struct question *question) {
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
        bool ipv4 = !target->address.words[0] && !target->address.words[1] &&
                    target->address.words[2] == bpf_htonl(0xffff);
        question->tuple.network = in->network;
        question->tuple.source = ipv4 ? in->ipv4 : in->ipv6;
        question->tuple.destination = target->address;
        question->tuple.destination_port = target->port;
        question->tuple.protocol = ctx->protocol;
        return true;
    }
    return false;
}

// Shows those who watch what a socket gets.
static __always_inline void show(const struct question *question, const struct target *got) {
    const struct watching *wants = wanted();
    if (!wants || !wants->every || (wants->network && wants->network != question->tuple.network))
        return;
    struct report report = {
        .time = bpf_ktime_get_ns(),
        .network = question->tuple.network,
        .source = question->tuple.source,
        .destination = question->tuple.destination,
        .destination_port = question->tuple.destination_port,
        .translated = got->address,
        .translated_port = got->port,
        .is_translated = 1,
        .protocol = question->tuple.protocol,
        .point = POINT_SOCKET,
        .verdict = VERDICT_CARRIED,
    };
    hand_over(&report);
}

// Chooses the backend that answers a question; gives its number, 0: nobody takes it.
static __always_inline __u32 choose(struct question *question, struct target *got) {
    struct front *front = front_of(&question->tuple);
    if (!front)
        return 0;
    // Where the agent gives the front's memory to another one right now, it has another number.
    question->client.front = front->id;
    question->client.address = question->tuple.source;
    __u32 number = front->affinity ? kept(front, &question->client) : 0;
    if (!number)
        number = scheduled(front, &question->tuple.source, 0);
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    if (!backend || backend->front != question->client.front)
        return 0;
    if (front->affinity)
        keep(&question->client, number);
    got->address = backend->address;
    got->port = backend->port ? backend->port : question->tuple.destination_port;
    return number;
}

// Counts a connection that a backend got. Interrupts count too.
static __always_inline void count_connection(__u32 number) {
    struct counts *counted;
    if (is_there(number, &counted) && counted)
        __sync_fetch_and_add(&counted->connections, 1);
}
