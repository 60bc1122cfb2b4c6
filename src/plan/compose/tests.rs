use super::*;
use proptest::prelude::*;

fn variables() -> Variables {
    [("N", "7"), ("NET", "front"), ("EMPTY", "")].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
}

fn stack(text: &str) -> Stack {
    let stack = read(text, "stack.yml", StackName::Given("shop"), &variables(), &Tool::Any);
    stack.unwrap_or_else(|problems| panic!("{text}: {}", told(&problems).join("\n")))
}

fn told(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(Problem::to_string).collect()
}

/// What is wrong with a text.
fn wrong(text: &str) -> Vec<String> {
    let stack = read(text, "stack.yml", StackName::OrElse("shop"), &variables(), &Tool::Any);
    told(&stack.expect_err(text))
}

/// The only service of a file in which `web` has these lines.
fn service(lines: &[&str]) -> Service {
    let body = lines.iter().map(|line| format!("    {line}\n")).collect::<String>();
    let declared = "networks: {front: , back: }\n";
    stack(&format!("{declared}services:\n  web:\n    image: web\n{body}")).services.remove(0)
}

/// The only network of a file, declared so.
fn network(declared: &str) -> Network {
    let mut stack = stack(&format!("services: {{}}\nnetworks:\n  front: {declared}\n"));
    stack.networks.remove("front").unwrap()
}

#[test]
fn a_service_says_how_many_it_is_and_how_it_is_replaced() {
    let (first, once) = (|parallelism| Update { start_first: true, parallelism }, Update::default());
    for (lines, mode, vip, update) in [
        (&["scale: 1"][..], Mode::Replicated(1), true, once),
        (&["scale: 4"], Mode::Replicated(4), true, once),
        (&["deploy:"], Mode::Replicated(1), true, once),
        (&["scale: 4", "deploy: {replicas: 5}"], Mode::Replicated(5), true, once),
        (&["deploy: {replicas: 0}"], Mode::Replicated(0), true, once),
        (&["deploy: {replicas: '3'}"], Mode::Replicated(3), true, once),
        (&["deploy: {replicas: $N}"], Mode::Replicated(7), true, once),
        (&["deploy: {replicas: '${M:-3}'}"], Mode::Replicated(3), true, once),
        (&["deploy: {replicas: '1${N}'}"], Mode::Replicated(17), true, once),
        (&["deploy: {replicas: ~}"], Mode::Replicated(1), true, once),
        (&["deploy: {mode: replicated, endpoint_mode: dnsrr}"], Mode::Replicated(1), false, once),
        (&["deploy: {mode: global, endpoint_mode: vip}"], Mode::Global, true, once),
        (&["deploy: {mode: replicated-job, replicas: 2}"], Mode::ReplicatedJob(2), false, once),
        (&["deploy: {mode: global-job}"], Mode::GlobalJob, false, once),
        (&["deploy: {update_config: {order: start-first}}"], Mode::Replicated(1), true, first(1)),
        (
            &["deploy:", "  update_config:", "    order: start-first", "    parallelism: 0"],
            Mode::Replicated(1),
            true,
            first(0),
        ),
        (
            &["deploy: {update_config: {parallelism: 3, order: stop-first}}"],
            Mode::Replicated(1),
            true,
            Update { start_first: false, parallelism: 3 },
        ),
    ] {
        let service = service(lines);
        assert_eq!((service.mode, service.vip, service.update), (mode, vip, update), "{lines:?}");
    }
}

#[test]
fn a_service_is_on_the_networks_it_names_or_the_default_one() {
    for (lines, expected) in [
        (&["networks:"][..], &["default"][..]),
        (&["networks: []"], &["default"]),
        (&["networks: {}"], &["default"]),
        (&["networks: [front]"], &["front"]),
        (&["networks: [default, $NET]"], &["default", "front"]),
        (
            &["networks:", "  front:", "  back: {aliases: [db], ipv4_address: 10.9.0.7}"],
            &["back", "front"],
        ),
    ] {
        let expected: BTreeSet<String> = expected.iter().map(|&key| key.to_owned()).collect();
        assert_eq!(service(lines).networks, expected, "{lines:?}");
    }
}

/// The services of a file as a tool deploys it, with their networks; or what is wrong with it.
fn deployed(text: &str, tool: &Tool) -> Result<Vec<(String, Vec<String>)>, Vec<String>> {
    let stack = read(text, "f", StackName::Given("s"), &variables(), tool);
    let services = stack.map_err(|problems| told(&problems))?.services.into_iter();
    Ok(services.map(|service| (service.name, service.networks.into_iter().collect())).collect())
}

fn compose(profiles: &[&str]) -> Tool {
    Tool::Compose { profiles: profiles.iter().map(|&profile| profile.to_owned()).collect() }
}

#[test]
fn a_network_mode_counts_for_compose_and_not_for_a_stack() {
    for mode in ["host", "none", "bridge", "default", "'service:db'", "'container:db'"] {
        let text = format!("services:\n  web:\n    network_mode: {mode}\n");
        let networks = |tool| deployed(&text, &tool).unwrap().remove(0).1;
        assert_eq!(networks(compose(&[])), [""; 0], "{mode}");
        assert_eq!(networks(Tool::Stack), ["default"], "{mode}");
        let problems = deployed(&text, &Tool::Any).unwrap_err();
        let expected =
            "f:3:19: services.web.network_mode: docker compose keeps to this, docker stack deploy";
        assert!(problems.len() == 1 && problems[0].starts_with(expected), "{problems:?}");
    }
    let both = "networks: {a: }\nservices: {web: {network_mode: host, networks: [a]}}";
    assert_eq!(deployed(both, &Tool::Stack).unwrap()[0].1, ["a"]);
    assert!(deployed(both, &compose(&[])).unwrap_err()[0].contains("is there beside networks"));
}

#[test]
fn a_service_with_profiles_counts_for_compose_if_one_is_active_and_always_for_a_stack() {
    let text = "services:\n  a: {}\n  b: {profiles: [debug, '$N']}\n  c: {profiles: [test]}\n  d: {profiles: []}\n";
    let names = |tool: &Tool| -> String {
        deployed(text, tool).unwrap().into_iter().map(|(name, _)| name).collect()
    };
    for (profiles, expected) in [
        (&[][..], "ad"),
        (&["debug"], "abd"),
        (&["7"], "abd"),
        (&["test", "other"], "acd"),
        (&["*"], "abcd"),
    ] {
        assert_eq!(names(&compose(profiles)), expected, "{profiles:?}");
    }
    assert_eq!(names(&Tool::Stack), "abcd");
    let problems = deployed(text, &Tool::Any).unwrap_err();
    let expected =
        "f:3:17: services.b.profiles: docker compose leaves this service out unless a profile";
    assert!(problems.len() == 2 && problems[0].starts_with(expected), "{problems:?}");
    // What is left out must be right all the same.
    let wrong = "services: {a: {profiles: [x], scale: many}}";
    assert!(deployed(wrong, &compose(&[])).unwrap_err()[0].contains("\"many\" is not a number"));
}

#[test]
fn a_network_has_the_name_that_docker_gives_it() {
    let made = |subnets: &[&str]| Origin::Stack {
        subnets: subnets
            .iter()
            .map(|cidr| Subnet::new(cidr.parse().unwrap(), None, None, BTreeSet::new()).unwrap())
            .collect(),
        ipv6: false,
    };
    for (declared, name, origin) in [
        ("", "shop_front", made(&[])),
        ("~", "shop_front", made(&[])),
        ("{}", "shop_front", made(&[])),
        ("{driver: overlay, attachable: true}", "shop_front", made(&[])),
        ("{name: web}", "web", made(&[])),
        ("{name: 'a-$NET'}", "a-front", made(&[])),
        ("{external: true}", "front", Origin::External),
        ("{external: yes, name: web}", "web", Origin::External),
        ("{external: '${X:-false}'}", "shop_front", made(&[])),
        ("{external: {name: web}}", "web", Origin::External),
        ("{external: {}}", "front", Origin::External),
        ("{external: true, name: host}", "host", Origin::Machine),
        ("{driver: bridge}", "shop_front", Origin::Machine),
        ("{ipam: {config: [{subnet: 10.9.0.0/24}]}}", "shop_front", made(&["10.9.0.0/24"])),
        (
            "{ipam: {config: [{subnet: 10.9.0.0/24}, {subnet: 'fd00:9::/64'}]}}",
            "shop_front",
            made(&["10.9.0.0/24", "fd00:9::/64"]),
        ),
    ] {
        let network = network(declared);
        assert_eq!((network.name.as_str(), network.origin), (name, origin), "{declared}");
    }
    assert_eq!(network("{enable_ipv6: true}").origin, Origin::Stack { subnets: vec![], ipv6: true });
    let text = "services: {}\nnetworks: {default: {external: true, name: web}}";
    assert_eq!(stack(text).networks["default"].name, "web");
    assert_eq!(stack("services: {}").networks["default"].name, "shop_default");
}

#[test]
fn a_subnet_keeps_its_gateway_range_and_reserved_addresses() {
    let declared = "{ipam: {driver: default, config: [{subnet: 10.9.0.0/24, gateway: 10.9.0.9, \
                    ip_range: 10.9.0.128/25, aux_addresses: {router: 10.9.0.200}}]}}";
    let Origin::Stack { subnets, .. } = network(declared).origin else { panic!("made by the stack") };
    assert_eq!(subnets[0].gateway().to_string(), "10.9.0.9");
    assert_eq!(subnets[0].range().unwrap().to_string(), "10.9.0.128/25");
    assert_eq!(subnets[0].reserved().len(), 1);
}

#[test]
fn fragments_anchors_and_merge_keys_are_followed() {
    let stack = stack(
        "x-deploy: &deploy\n  replicas: 2\n  update_config: &first {order: start-first}\n\
         x-one: &one {replicas: 1, endpoint_mode: dnsrr}\n\
         services:\n  a:\n    deploy: *deploy\n\
         \x20 b:\n    deploy:\n      <<: *deploy\n      replicas: 9\n\
         \x20 c: &c\n    deploy:\n      <<: [*one, *deploy]\n\
         \x20 d:\n    <<: *c\n    networks: [default]\n",
    );
    let shown: Vec<_> = stack.services.iter().map(|s| (s.mode, s.vip, s.update.start_first)).collect();
    let one = (Mode::Replicated(1), false, true);
    assert_eq!(shown, [(Mode::Replicated(2), true, true), (Mode::Replicated(9), true, true), one, one]);
}

#[test]
fn the_stack_has_the_name_it_is_given_or_says_or_that_of_its_folder() {
    let name = |text, name| read(text, "f", name, &variables(), &Tool::Any).map(|stack| stack.name);
    let file = "name: from-${N}\nservices: {}";
    assert_eq!(name(file, StackName::Given("given")).unwrap(), "given");
    assert_eq!(name(file, StackName::OrElse("folder")).unwrap(), "from-7");
    assert_eq!(name("services: {}", StackName::OrElse("-My Shop_2.0")).unwrap(), "myshop_20");
    let error = name("services: {}", StackName::OrElse("..")).unwrap_err();
    assert!(error[0].text.contains("give it one with `name:`"));
}

#[test]
fn everything_that_is_wrong_is_told_with_its_place() {
    let text = "\
name: Shop
services:
  web:
    image: ${IMAGE:?not our business}
    networks: [front, none-such, front]
    deploy:
      replicas: many
      mode: everywhere
      endpoint_mode: [vip]
      update_config: {order: first, parallelism: -1}
  db:
    network_mode: host
    networks: {back: 7, other: {ipv4_address: x}}
    scale: $UNSET
  all: {deploy: {mode: global, replicas: 2}}
  job:
  odd: {network_mode: mine, extends: {service: web}}
networks:
  front: {external: maybe, driver: {}}
  back: {name: Back}
  more: [1]
  nets:
    ipam:
      config: [{subnet: 10.9.0.7/24}, {subnet: x}, {subnet: 10.8.0.0/16}, {subnet: 10.8.1.0/24}]
";
    let expected = [
        "1:7: name: \"Shop\" cannot be a stack's name: use a-z, 0-9, '-' and '_', a letter or digit first",
        "5:23: services.web.networks[1]: there is no network \"none-such\" under the file's networks",
        "5:34: services.web.networks[2]: network \"front\" is there twice",
        "7:17: services.web.deploy.replicas: \"many\" is not a number",
        "8:13: services.web.deploy.mode: \"everywhere\" is none of replicated, global, replicated-job, \
         global-job",
        "9:22: services.web.deploy.endpoint_mode: a list is here: give one of vip, dnsrr",
        "10:30: services.web.deploy.update_config.order: \"first\" is none of stop-first, start-first",
        "10:50: services.web.deploy.update_config.parallelism: \"-1\" is negative: give 0 or more",
        "12:19: services.db.network_mode: is there beside networks: give one of them",
        "13:22: services.db.networks.back: a text is here: give a map",
        "13:25: services.db.networks: there is no network \"other\" under the file's networks",
        "13:47: services.db.networks.other.ipv4_address: \"x\" is not an IPv4 address",
        "14:12: services.db.scale: \"\" is not a number (UNSET is not set)",
        "15:42: services.all.deploy.replicas: a global service has no replicas: it runs once on each node",
        "16:3: services.job: nothing is here: give a map",
        "17:23: services.odd.network_mode: \"mine\" is none of host, none, bridge, default, service:NAME, \
         container:NAME",
        "17:38: services.odd.extends: is not followed here: give what `docker compose config` prints",
        "19:21: networks.front.external: \"maybe\" is not true or false",
        "20:9: networks.back: name \"Back\" has a character that is not allowed: use a-z, 0-9, '-' and '_'",
        "21:9: networks.more: a list is here: give a map",
        "24:16: networks.nets.ipam.config[0]: subnet 10.9.0.7/24 has host bits set: did you mean \
         10.9.0.0/24?",
        "24:48: networks.nets.ipam.config[1].subnet: \"x\" is not a subnet such as 10.9.0.0/24",
        "24:75: networks.nets.ipam.config[3]: 10.8.1.0/24 overlaps 10.8.0.0/16",
    ];
    assert_eq!(wrong(text), expected.map(|line| format!("stack.yml:{line}")));
}

#[test]
fn a_file_that_is_no_compose_file_is_told_so() {
    let bomb = (1..40).fold("x-0: &x0 [a]\n".to_owned(), |text, n| {
        let last = n - 1;
        format!("{text}x-{n}: &x{n} [*x{last}, *x{last}, *x{last}, *x{last}]\n")
    });
    let large = "#".repeat(MAX_BYTES + 1);
    for (text, expected) in [
        ("", "stack.yml:1:1: is empty: give a Compose file"),
        ("# nothing\n", "is empty"),
        ("~", "is empty"),
        ("just text", "stack.yml:1:1: a text is here: give a map"),
        ("- a", "stack.yml:1:1: a list is here: give a map"),
        ("web: {image: a}", "stack.yml:1:1: has no services: is it a Compose file?"),
        ("services:", "has no services"),
        ("services: [web]", "stack.yml:1:11: services: a list is here: give a map"),
        ("services: {}\nnetworks: web", "stack.yml:2:11: networks: a text is here"),
        ("services: {}\ninclude: [a.yml]", "stack.yml:2:10: include: is not followed here"),
        ("services: {web: {}, web: {}}", "services: \"web\" is there twice"),
        ("services: {}\n---\nservices: {}", "stack.yml:2:1: a second document"),
        ("services: {web: {scale: '${A:?why}'}}", "services.web.scale: the variable A must be set: why"),
        ("services: {web: {scale: '${'}}", "services.web.scale: a $ is not followed"),
        ("services: {web: {scale: 99999999999}}", "\"99999999999\" is too large"),
        ("services: {web: {scale: 1.5}}", "\"1.5\" is not a number"),
        ("services: {web: {scale: ''}}", "services.web.scale: \"\" is not a number"),
        ("services: {web: {networks: {front: }}}", "there is no network \"front\""),
        ("services: {}\nnetworks: {a: {name: '$NO'}}", "\"\" is empty: give a text (NO is not set)"),
        ("services: {}\nnetworks: {a: {name: x, external: {name: x}}}", "has two names"),
        (&format!("{bomb}services: {{}}"), "aliases written out"),
        (&"[".repeat(90), "nested deeper"),
        (&large, "is larger than 4 MiB"),
    ] {
        let problems = wrong(text);
        assert!(problems.len() == 1 && problems[0].contains(expected), "{expected}: {problems:?}");
    }
}

#[test]
fn of_very_many_problems_100_are_told() {
    let services = (0..500).map(|n| format!("  s{n}: {{scale: x, scale: y}}\n")).collect::<String>();
    assert_eq!(wrong(&format!("services:\n{services}")).len(), 100);
}

/// Lines that files are made of, with what may be wrong in them.
fn lines() -> impl Strategy<Value = String> {
    let key = prop::sample::select(vec![
        "services",
        "networks",
        "web",
        "front",
        "deploy",
        "replicas",
        "mode",
        "scale",
        "external",
        "name",
        "ipam",
        "config",
        "subnet",
        "update_config",
        "order",
        "<<",
        "network_mode",
        "aliases",
    ]);
    let value = prop::sample::select(vec![
        "",
        "{}",
        "[]",
        "1",
        "-1",
        "global",
        "start-first",
        "&a",
        "*a",
        "[front]",
        "${N}",
        "${N:-",
        "true",
        "10.9.0.0/24",
        "[{subnet: 10.9.0.0/24}]",
        "'",
        "{name: x}",
        "|",
        "~",
        "!!str 3",
        "ä",
    ]);
    (0usize..5, any::<bool>(), key, value).prop_map(|(depth, item, key, value)| {
        format!("{}{}{key}: {value}\n", "  ".repeat(depth), if item { "- " } else { "" })
    })
}

proptest! {
    #[test]
    fn any_text_is_a_stack_or_problems(text in "\\PC{0,80}|[ -~\n]{0,80}") {
        let stack = read(&text, "f", StackName::OrElse("x"), &variables(), &Tool::Any);
        prop_assert!(stack.map_or_else(|problems| !problems.is_empty(), |_| true));
    }

    #[test]
    fn any_lines_are_a_stack_or_problems(lines in prop::collection::vec(lines(), 0..14)) {
        let stack = read(&lines.concat(), "f", StackName::OrElse("x"), &variables(), &Tool::Any);
        prop_assert!(stack.map_or_else(|problems| !problems.is_empty(), |_| true));
    }
}
