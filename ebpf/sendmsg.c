// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// sendto(2) and sendmsg(2) of a container's UDP socket that is not connected: what is for a service goes to a
// backend, as long as that is there and the two speak with each other.
#include "datagram.h"

// A socket that is connected gets nothing but from whom it is connected to (TCP_ESTABLISHED of all protocols).
#define CONNECTED 1

// How what a backend sends to a socket is known.
static __always_inline struct datagram_key reply_of(const struct datagram_key *asked, const struct datagram *to) {
    return (struct datagram_key){
        .socket = asked->socket,
        .address = to->address,
        .port = to->port,
        .reply = 1,
    };
}

static __always_inline bool
is_of(const struct datagram *reply, const struct datagram_key *asked) {
    return reply->port == asked->port && same(&reply->address, &asked->address);
}

// Whether a socket goes on with the backend that it has: that is there, and one of them has sent something.
static __always_inline bool goes_on(const struct datagram_key *asked, const struct datagram *to) {
    if (!has_backend(to))
        return false;
    if (is_young(to))
        return true;
    struct datagram_key key = reply_of(asked, to);
    struct datagram *reply = bpf_map_lookup_elem(&datagrams, &key);
    return reply && is_of(reply, asked) && is_young(reply);
}

// Enters that what a backend sends to a socket comes from a service. Gives -1 where the socket speaks with it for
// another one.
static __always_inline int enter_reply(const struct datagram_key *asked, const struct datagram *to) {
    struct datagram_key key = reply_of(asked, to);
    struct datagram from = *to;
    from.address = asked->address;
    from.port = asked->port;
    struct datagram *there = bpf_map_lookup_elem(&datagrams, &key);
    if (there && !is_of(there, asked) && is_young(there))
        return -1;
    return bpf_map_update_elem(&datagrams, &key, &from, BPF_ANY) ? -1 : 0;
}

// Chooses a backend for a socket and enters it; gives its number, 0: nobody takes what it sends, -1: it speaks
// with those that were tried for other services.
static __always_inline int
begin(const struct tuple *tuple, const struct datagram_key *key, struct target *got) {
    for (__u32 tries = 0; tries < TRIES; tries++) {
        __u32 chosen = choose(tuple, got, tries);
        if (!chosen)
            return 0;
        struct datagram to = {
            .address = got->address,
            .port = got->port,
            .network = tuple->network,
            .backend = chosen,
            .seen = seconds(),
        };
        if (!enter_reply(key, &to))
            return bpf_map_update_elem(&datagrams, key, &to, BPF_ANY) ? -1 : (int)chosen;
    }
    return -1;
}

// Gives the verdict on a datagram; its target may be another one then.
static __always_inline int send_to_service(struct bpf_sock_addr *ctx, struct target *target, bool *is_other) {
    struct tuple tuple = {};
    struct target got = {};
    struct datagram_key key = {};
    struct bpf_sock *sock = ctx->sk;
    *is_other = false;
    if (ctx->protocol != IPPROTO_UDP || (sock && sock->state == CONNECTED) ||
        !is_for_service(ctx, target, &tuple))
        return ALLOW;
    key.socket = bpf_get_socket_cookie(ctx);
    key.address = target->address;
    key.port = target->port;
    struct datagram *known = bpf_map_lookup_elem(&datagrams, &key);
    if (known && goes_on(&key, known)) {
        target->address = known->address;
        target->port = known->port;
        // Once a second the other entry is as young as this one, and there where it was not.
        if (known->seen != seconds()) {
            known->seen = seconds();
            enter_reply(&key, known);
        }
        *is_other = true;
        return ALLOW;
    }
    int chosen = begin(&tuple, &key, &got);
    if (chosen < 0) {
        // Its packets could not be told apart either.
        note(EVENT_PORT_TAKEN);
        show(&tuple, &got, EVENT_PORT_TAKEN + 1);
        return REFUSE;
    }
    if (!chosen)
        return ALLOW;
    opened(chosen);
    show(&tuple, &got, 0);
    *target = got;
    *is_other = true;
    return ALLOW;
}

SEC("cgroup/sendmsg4")
int netctl_send4(struct bpf_sock_addr *ctx) {
    struct target target = target4(ctx);
    bool is_other;
    int verdict = send_to_service(ctx, &target, &is_other);
    if (is_other)
        put4(ctx, &target);
    return verdict;
}

SEC("cgroup/sendmsg6")
int netctl_send6(struct bpf_sock_addr *ctx) {
    struct target target = target6(ctx);
    bool is_other;
    int verdict = send_to_service(ctx, &target, &is_other);
    if (is_other)
        put6(ctx, &target);
    return verdict;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
