// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What comes from other nodes, where it enters this one: packets in the tunnel for containers leave it here,
// and skip the stack. Everything else goes on as it is, so all that the kernel refuses it refuses.
#include "path.h"
#include "report.h"

// Where this node's tunnel ends: they are set when the program is loaded.
const volatile struct address local = {};
const volatile __u32 port = 0;

// Finds out to which container packets go, and where such come from; gives whether there are both.
static __always_inline bool find_container(struct flow *flow) {
    __u32 network = flow->key.network >> 8;
    struct address address = flow->key.destination;
    struct meaning *to = meaning_of(network, &address);
    if (!to)
        return false;
    flow->to = *to;
    // Its entry may have become another's.
    if (meaning_of(network, &address) != to)
        return false;
    address = flow->key.source;
    struct way *from = way_to(network, &address);
    if (!from)
        return false;
    flow->way = *from;
    return flow->to.kind == ADDRESS_CONTAINER && flow->to.interface && flow->to.crossing;
}

// Brings a packet out of the tunnel, and on its way to a container.
static __always_inline int
bring(struct __sk_buff *skb, struct packet *packet, const struct arrival *arrival, const struct meaning *to) {
    if (strip(skb, arrival))
        return PASS;
    packet->transport -= arrival->at - ETH_HLEN;
    if (pass_on(skb, packet, &to->mac, &arrival->router, arrival->protocol) ||
        (to->balances && translate_answer(skb, packet)))
        return lost(packet);
    // The way through the sandbox: see into_container.c.
    skb->mark = to->interface;
    return bpf_redirect_peer(to->crossing, 0);
}

SEC("classifier")
int netctl_wire_in(struct __sk_buff *skb) {
    struct packet packet = {};
    struct arrival arrival = {};
    if (skb->vlan_present || skb->pkt_type != PACKET_HOST || read_tunnel(skb, &arrival))
        return PASS;
    struct address here = {.halves = {local.halves[0], local.halves[1]}};
    // What a router on the way has marked the kernel brings to the packet within.
    if (arrival.port != (__be16)port || !same(&arrival.local, &here) || arrival.congestion == CONGESTION)
        return PASS;
    packet.tuple.network = arrival.network;
    if (read_addresses(skb, &packet, arrival.protocol, arrival.at) || !packet.plain)
        return PASS;
    const struct tuple *tuple = &packet.tuple;
    __u32 place = place_of(tuple, 0, 0);
    struct flow *flow = bpf_map_lookup_elem(&flows, &place);
    if (!flow)
        return PASS;
    __u64 now = current_generation();
    if (!is_known(flow, tuple, 0, 0, now)) {
        begin_flow(flow, tuple, 0, 0, now);
        if (!find_container(flow))
            return PASS;
        flow->until = bpf_jiffies64() + HOLDS;
    }
    if (!fits(skb, &packet, arrival.at, flow->to.mtu))
        return PASS;
    // Only the node that has an address speaks for it, and only to this one's own end of the tunnel.
    if (!same(&flow->way.remote, &arrival.remote) || !same_mac(&flow->way.local_mac, &arrival.router))
        return PASS;
    // The kernel notes in datagrams that it has merged that they were in a tunnel, which this cannot take
    // back: whoever cuts them again would look for it.
    if (skb->gso_size && packet.tuple.protocol == IPPROTO_UDP)
        return PASS;
    struct report *report = begin_report(skb, &packet, POINT_FROM_WIRE, arrival.at);
    return end_report(report, &packet, bring(skb, &packet, &arrival, &flow->to));
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
