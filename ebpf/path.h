// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// The path that skips the stack: from container to container on a node, and to the device by which the
// tunnel's packets leave. What a packet needs beyond being carried on the kernel does, as without us.
#pragma once
#include "answer.h"
#include "flow.h"
#include "tunnel.h"

static __always_inline struct meaning *meaning_of(__u32 network, const struct address *address) {
    struct place place = {.network = network, .address = *address};
    return bpf_map_lookup_elem(&addresses, &place);
}

static __always_inline struct way *way_to(__u32 network, const struct address *address) {
    struct range range = {.bits = 8 * (sizeof range - sizeof range.bits), .network = network};
    range.address = *address;
    return bpf_map_lookup_elem(&ways, &range);
}

// Whether a packet, or each that a large one is cut into, is no longer than a way takes.
static __always_inline bool
fits(struct __sk_buff *skb, const struct packet *packet, __u32 at, __u32 mtu) {
    __u32 size = skb->gso_size;
    __u8 words;
    if (!size)
        return skb->len - at <= mtu;
    size += packet->transport - at;
    if (packet->tuple.protocol == IPPROTO_UDP)
        return size + sizeof(struct udphdr) <= mtu;
    // The upper half of byte 12 is the length of the header in words (RFC 9293, 3.1).
    if (load(skb, packet->transport + 12, &words, sizeof words))
        return false;
    return size + (words >> 4) * 4 <= mtu;
}

// A frame with the beginning of its packet. The first field is not written: with it all lie where they can be
// written as a whole.
struct beginning {
    __u16 before;
    struct frame frame;
    struct opening within;
};

// A packet is for a container, from the router that it came to, and one router older.
static __always_inline int pass_on(
    struct __sk_buff *skb,
    const struct packet *packet,
    const struct mac *to,
    const struct mac *router,
    __be16 protocol) {
    struct beginning beginning = {.frame = {*to, *router, protocol}};
    if (!packet->ipv4)
        return age_ipv6(skb, packet, ETH_HLEN) ||
               bpf_skb_store_bytes(skb, 0, &beginning.frame, sizeof beginning.frame, 0);
    if (read_aged_ipv4(skb, packet, ETH_HLEN, &beginning.within))
        return -1;
    return bpf_skb_store_bytes(skb, 0, &beginning.frame, sizeof beginning - sizeof beginning.before, 0);
}

// Brings a packet of a container of this network to another of this node.
static __always_inline int deliver(struct __sk_buff *skb, struct packet *packet, const struct meaning *to) {
    struct mac router;
    if (load(skb, 0, &router, sizeof router))
        return PASS;
    if (pass_on(skb, packet, &to->mac, &router, skb->protocol) ||
        (to->balances && translate_answer(skb, packet)))
        return lost(packet);
    return bpf_redirect_peer(to->interface, 0);
}

// Puts a packet into the tunnel, and across into the host's namespace. The mark says there which flow it is of.
static __always_inline int encapsulate(
    struct __sk_buff *skb, struct packet *packet, struct flow *flow, __u32 place, __u32 hash) {
    struct tunnel tunnel = {
        .flow = flow,
        .packet = packet,
        .length = skb->len,
        .hash = hash,
        .protocol = skb->protocol,
    };
    __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
                  BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH;
    // What is in a tunnel of the container's own already, the kernel puts into ours.
    if (is_mapped(&flow->way.remote)) {
        if (bpf_skb_adjust_room(skb, sizeof(struct iphdr) + TUNNEL_HEADERS, BPF_ADJ_ROOM_MAC,
                                flags | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4))
            return PASS;
        if (write_ipv4(skb, &tunnel))
            return lost(packet);
    } else {
        if (bpf_skb_adjust_room(skb, sizeof(struct ipv6hdr) + TUNNEL_HEADERS, BPF_ADJ_ROOM_MAC,
                                flags | BPF_F_ADJ_ROOM_ENCAP_L3_IPV6))
            return PASS;
        if (write_ipv6(skb, &tunnel))
            return lost(packet);
    }
    skb->mark = place + 1;
    return bpf_redirect_peer(flow->way.crossing, 0);
}

// Finds out where packets of a container go that need no stack; gives whether they do.
static __always_inline bool find_way(const struct __sk_buff *skb, struct flow *flow) {
    __u32 network = flow->key.network >> 8;
    struct address address = flow->key.source;
    struct meaning *from = meaning_of(network, &address);
    // Whoever speaks for another is the kernel's to refuse.
    if (!from || from->kind != ADDRESS_CONTAINER || from->interface != skb->ifindex)
        return false;
    address = flow->key.destination;
    struct meaning *to = meaning_of(network, &address);
    if (to) {
        flow->to = *to;
        // Its entry may have become another's.
        if (meaning_of(network, &address) != to)
            return false;
        return flow->to.kind == ADDRESS_CONTAINER && flow->to.interface != skb->ifindex && flow->to.interface;
    }
    struct way *way = way_to(network, &address);
    if (!way)
        return false;
    flow->to.kind = 0;
    flow->way = *way;
    return flow->way.crossing;
}

// Sends a packet of a container on past the stack, where that does all that the stack would; unless it `may_look`
// only where the last packet of its flow has found out how.
SEPARATE int send(struct __sk_buff *skb, struct packet *packet, __u32 may_look) {
    if (!packet || !packet->plain || skb->pkt_type != PACKET_HOST)
        return PASS;
    const struct tuple *tuple = &packet->tuple;
    __u32 interface = skb->ifindex, hash = hash_of(skb, packet), spread = hash % SPREAD;
    __u32 place = place_of(tuple, interface, spread);
    struct flow *flow = bpf_map_lookup_elem(&flows, &place);
    if (!flow)
        return PASS;
    __u64 now = current_generation();
    if (!is_known(flow, tuple, interface, spread, now)) {
        if (!may_look)
            return PASS;
        begin_flow(flow, tuple, interface, spread, now);
        if (!find_way(skb, flow))
            return PASS;
        flow->until = bpf_jiffies64() + HOLDS;
    }
    bool is_here = flow->to.kind == ADDRESS_CONTAINER;
    if (!fits(skb, packet, ETH_HLEN, is_here ? flow->to.mtu : flow->way.mtu))
        return PASS;
    return is_here ? deliver(skb, packet, &flow->to) : encapsulate(skb, packet, flow, place, hash);
}
